"""The house rules, read from the source: imports run one way, light commands stay light, files stay small."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"engine": 0, "actors": 1, "cluster": 2, "cli": 3}
HEAVY = {"torch", "transformers", "ray"}
# These are read by `plan` and `--help`, which a person waits for.
# The sub-packages of engine/, from the ground up: each imports only those before it.
ORDER = (
    *("errors", "sizes", "codec", "fields", "untrusted", "storage", "checkpoints", "task_vectors", "models"),
    *("methods", "config", "planning", "calibration", "shards", "learning", "run", "evaluation", "output", "report"),
)
LIGHT = [
    f"engine.{name}"
    for name in (
        *("fields", "errors", "untrusted", "storage.folder", "storage.paths", "storage.cache", "storage.lease"),
        *("checkpoints.headers", "checkpoints.find", "checkpoints.adapters", "checkpoints.vocabulary"),
        *("methods.registry", "methods.catalog", "config.schema", "config.reader", "config.mergekit_yaml"),
        *("planning.plan", "planning.planner", "planning.matching", "planning.scaling", "planning.summary"),
        *("calibration.records", "calibration.samples", "report.page", "evaluation.items", "evaluation.metrics"),
        "evaluation.results",
    )
] + ["cli"]
FILES = [*sorted(path for layer in list(LAYERS)[:3] for path in (ROOT / layer).rglob("*.py")), ROOT / "cli.py"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
FILE_LINES, FUNCTION_LINES, DRIVER_LINES = 350, 60, 200

each_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def lines(module: str) -> int:
    return len(MODULES[module].read_text(encoding="utf-8").splitlines())


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: no function's body, and nothing that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


def imported(nodes: Iterator[ast.AST], module: str) -> set[str]:
    """Full names of the modules that the nodes import; of ours the submodule where `from` names one."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: {ast.unparse(node)}"
            assert node.module is not None
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {node.module} | (parts & MODULES.keys())
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            raise AssertionError(f"{module} imports what cannot be read from its source: {ast.unparse(node)}")
    return names


def root(name: str) -> str:
    return name.partition(".")[0]


def reached(module: str) -> dict[str, str]:
    """All modules that importing `module` imports, as far as our own sources tell, each with who imports it."""
    found, waiting = {module: ""}, [module]
    while waiting:
        one = waiting.pop()
        for name in imported(at_import(tree(one)), one):
            if name not in found:
                found[name] = one
                if name in MODULES:
                    waiting.append(name)
    return found


def test_the_sources_are_there() -> None:
    assert {root(module) for module in MODULES} == set(LAYERS)
    assert len(MODULES) > 25


@each_module
def test_imports_run_one_way(module: str) -> None:
    names = imported(ast.walk(tree(module)), module)
    upwards = {name for name in names if LAYERS.get(root(name), 0) > LAYERS[root(module)]}
    assert not upwards
    assert not {root(name) for name in names} & {"tests", "benchmarks", "examples", "tiny", "conftest"}


@each_module
def test_nobody_imports_in_a_circle(module: str) -> None:
    ours = {name for name in imported(at_import(tree(module)), module) if name in MODULES}
    assert not {name for name in ours if module in reached(name)}


@each_module
def test_only_the_cluster_imports_ray(module: str) -> None:
    if root(module) != "cluster":
        assert "ray" not in {root(name) for name in imported(ast.walk(tree(module)), module)}


@pytest.mark.parametrize("module", LIGHT)
def test_what_a_plan_needs_imports_nothing_heavy(module: str) -> None:
    heavy = {name: by for name, by in reached(module).items() if root(name) in HEAVY}
    assert not heavy


def loaded(script: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after the script."""
    code = f"{script}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after `cli.py` with these arguments."""
    return loaded(
        f"import runpy, sys\nsys.argv = ['cli.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path('cli.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["evaluate", "--help"]], ids=" ".join)
def test_help_loads_neither_torch_nor_ray(arguments: list[str]) -> None:
    modules = loaded_by(*arguments)
    assert {"click", "engine"} <= modules
    assert not modules & HEAVY


def test_making_a_plan_loads_neither_torch_nor_ray(llama_merge: Path) -> None:
    modules = loaded_by("plan", str(llama_merge))
    assert {"safetensors", "rich", "engine"} <= modules
    assert not modules & HEAVY


@each_module
def test_a_module_says_what_it_is(module: str) -> None:
    docstring = ast.get_docstring(tree(module))
    assert docstring is not None and len(docstring) > 20


@each_module
def test_a_file_stays_small(module: str) -> None:
    assert lines(module) <= (DRIVER_LINES if module == "cluster.driver" else FILE_LINES)


@each_module
def test_a_function_stays_small(module: str) -> None:
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > FUNCTION_LINES} == {}


@each_module
def test_sub_packages_import_downwards(module: str) -> None:
    _, part, *_ = f"{module}..".split(".")
    if root(module) == "engine" and part:
        parts = {name.split(".")[1] for name in imported(ast.walk(tree(module)), module) if name.startswith("engine.")}
        assert not {one for one in parts if ORDER.index(one) > ORDER.index(part)}
