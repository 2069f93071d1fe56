"""Record the wording of every error that a user can see: `python tests/golden/messages.py` writes messages.txt.

The templates are read from the sources, so an error counts whether or not a test raises it, and the record does not
depend on the versions of the libraries that a message may quote.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_suffix(".txt")
FIELDS = ("what", "where", "expected", "do")
ERRORS = ROOT / "engine" / "errors.py"
# A class that the caller chooses, and the error of a pydantic validator, which the config's reader shows.
OTHERS = {"error_type", "ValueError"}


def error_names() -> set[str]:
    """The classes of engine/errors.py."""
    tree = ast.parse(ERRORS.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)} | OTHERS


def wording(node: ast.expr) -> str:
    """A text as the source has it, with `{expression}` for each part that is computed."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(wording, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return wording(node.left) + wording(node.right)
    if isinstance(node, ast.IfExp):
        return f"{{{wording(node.body)} | {wording(node.orelse)}}}"
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def messages(path: Path) -> Iterator[str]:
    """The errors of one file, in the order of the source, each as a block of lines."""
    names = error_names()
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        if not isinstance(call.func, ast.Name) or call.func.id not in names or not (call.args or call.keywords):
            continue
        given = dict(zip(FIELDS, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        texts = {field: wording(given[field]) for field in FIELDS if field in given}
        yield "\n".join([call.func.id, *(f"  {field}: {text}" for field, text in texts.items())])


def record() -> str:
    """All errors of the engine, the actors, the cluster and the command line, by file."""
    files = [path for layer in ("engine", "actors", "cluster") for path in sorted((ROOT / layer).rglob("*.py"))]
    parts = []
    for path in [*files, ROOT / "cli.py"]:
        found = list(messages(path)) if path != ERRORS else []
        if found:
            parts.append("\n\n".join([f"# {path.relative_to(ROOT).as_posix()}", *found]))
    return "\n\n\n".join(parts) + "\n"


if __name__ == "__main__":
    RECORD.write_text(record(), encoding="utf-8")
