"""The house rules, read from the sources: imports run one way, light modules stay light, files stay small."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"engine": 0, "actors": 1, "cluster": 2, "cli": 3}
HEAVY = {"torch", "transformers", "ray"}
# The parts of engine/ from the ground up: a module imports only its own part and earlier ones, wherever the import
# stands (in a function, for the type checker alone).
ORDER = (
    *("errors", "sizes", "machine", "codec", "packing", "transfers", "fields", "untrusted", "bounded_process"),
    *("storage", "compiled", "checkpoints"),
    *(
        "task_vectors",
        "models",
        "statistics",
        "methods",
        "config",
        "planning",
        "calibration",
        "shards",
        "learning",
        "correction",
        "compression",
        "run",
    ),
    *("evaluation", "output", "search", "report"),
)
# `plan`, `--help` and the reading of a config import these, and a person waits for them: no torch, transformers or ray.
# A name that ends in a dot stands for all modules of that folder.
LIGHT = (
    *("engine.errors", "engine.sizes", "engine.machine", "engine.fields", "engine.untrusted", "engine.storage."),
    "engine.bounded_process",
    *(
        "engine.config.",
        "engine.planning.",
        "engine.report.",
        "engine.calibration.records",
        "engine.calibration.samples",
    ),
    *("engine.checkpoints.find", "engine.checkpoints.headers", "engine.checkpoints.adapters"),
    *(
        "engine.checkpoints.vocabulary",
        "engine.checkpoints.match",
        "engine.checkpoints.structure",
        "engine.checkpoints.ranges",
        "engine.methods.",
    ),
    *(
        "engine.evaluation.items",
        "engine.evaluation.metrics",
        "engine.evaluation.results",
        "engine.evaluation.tables",
        "cli",
    ),
    *("engine.run.ownership", "engine.run.place"),
    *("engine.search.objective", "engine.search.outlook", "engine.search.record", "engine.search.space"),
)
NOT_LIGHT = ("engine.planning.open_models", "engine.methods.arithmetic")
FILES = [*sorted(path for layer in list(LAYERS)[:3] for path in (ROOT / layer).rglob("*.py")), ROOT / "cli.py"]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
FILE_LINES, FUNCTION_LINES, DRIVER_LINES, FOLDER_FILES = 350, 60, 200, 12
# A file a method, a file a duty of the driver, and a file a command: these grow with what there is to do.
LARGE_FOLDERS = {"engine/methods", "cluster", "cluster/commands"}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def part(module: str) -> str:
    """The part of engine/ that a module belongs to; empty for engine itself."""
    return f"{module}.".split(".")[1]


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
    assert len(MODULES) > 100
    assert {part(module) for module in MODULES if root(module) == "engine"} - {""} == set(ORDER)


def test_imports_run_one_way() -> None:
    wrong = set()
    for module in MODULES:
        for name in imported(ast.walk(tree(module)), module):
            upwards = LAYERS.get(root(name), 0) > LAYERS[root(module)]
            if upwards or root(name) in {"tests", "benchmarks", "examples", "tiny", "conftest"}:
                wrong.add((module, name))
    assert wrong == set()


def test_parts_of_the_engine_import_downwards() -> None:
    wrong = set()
    for module in (module for module in MODULES if root(module) == "engine" and part(module) in ORDER):
        for name in imported(ast.walk(tree(module)), module):
            if root(name) == "engine" and part(name) and ORDER.index(part(name)) > ORDER.index(part(module)):
                wrong.add((module, name))
    assert wrong == set()


def test_no_module_imports_in_a_circle() -> None:
    edges = {module: {n for n in imported(ast.walk(tree(module)), module) if n in MODULES} for module in MODULES}
    edges = {module: {name for name in names if name != module} for module, names in edges.items()}

    def below(module: str) -> set[str]:
        found: set[str] = set()
        waiting = [module]
        while waiting:
            new = edges[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    assert [module for module in MODULES if module in below(module)] == []


def test_only_the_cluster_imports_ray() -> None:
    outside = [module for module in MODULES if root(module) != "cluster"]
    assert [m for m in outside if "ray" in {root(name) for name in imported(ast.walk(tree(m)), m)}] == []


def light_modules() -> list[str]:
    def matches(module: str, names: tuple[str, ...]) -> bool:
        return any(f"{module}.".startswith(name if name.endswith(".") else f"{name}.") for name in names)

    return [module for module in MODULES if matches(module, LIGHT) and not matches(module, NOT_LIGHT)]


def test_what_a_plan_needs_imports_nothing_heavy() -> None:
    light = light_modules()
    assert len(light) > 40
    heavy = {m: {name: by for name, by in reached(m).items() if root(name) in HEAVY} for m in light}
    assert {module: found for module, found in heavy.items() if found} == {}


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


def test_a_module_says_what_it_is() -> None:
    docstrings = {module: ast.get_docstring(tree(module)) or "" for module in MODULES}
    assert {module for module, docstring in docstrings.items() if len(docstring) <= 20} == set()


def test_packages_import_nothing_by_themselves() -> None:
    """A light module would import whatever the packages above it import. `os` and `typing` are always loaded."""
    packages = [module for module, path in MODULES.items() if path.name == "__init__.py"]
    assert [module for module in packages if imported(at_import(tree(module)), module) - {"os", "typing"}] == []


def test_files_stay_small() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    allowed = dict.fromkeys(MODULES, FILE_LINES) | {"cluster.driver": DRIVER_LINES}
    assert {module: count for module, count in lines.items() if count > allowed[module]} == {}


def test_functions_stay_small() -> None:
    large = {}
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES:
                    large[f"{module}.{node.name}"] = size
    assert large == {}


def test_folders_stay_small() -> None:
    files = defaultdict(set)
    for path in FILES:
        if path.name != "__init__.py":
            files[path.parent.relative_to(ROOT).as_posix()].add(path.name)
    sizes = {folder: len(names) for folder, names in files.items() if folder not in LARGE_FOLDERS}
    assert {folder: size for folder, size in sizes.items() if size > FOLDER_FILES} == {}


def test_no_two_public_classes_have_one_name() -> None:
    where = defaultdict(set)
    for module in MODULES:
        for node in tree(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].add(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}
