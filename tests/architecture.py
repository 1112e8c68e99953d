"""The rooms of the project and the imports between them, read from the source.

`python -m tests.architecture` prints them.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "vitpareto"
FOLDERS = ("methods", "search", "clusters", "dashboards")

#: every room, from the lowest up, and the rooms that it may import; `methods.*` stands for all
#: rooms of methods, and `vitpareto` for the root, which wires the command. METHODS are open to all
ALLOWED: dict[str, str] = {
    "methods.engine": "",
    "methods.slicing": "methods.engine",
    "methods.token": "methods.engine",
    "methods.structure": "methods.engine methods.slicing",
    "methods.controls": "methods.engine",
    "methods": "methods.*",
    "search": "",
    "search.stats": "search",
    "search.files": "search",
    "search.data": "search search.files",
    "search.models": "search search.files search.data",
    "search.runtimes": "search",
    "search.measure": "search search.files search.data",
    "search.training": "search search.stats search.files search.data search.models search.measure",
    "search.study": "search search.stats search.files search.data search.models search.measure "
    "search.training",
    "search.export": "search search.stats search.data search.models search.runtimes "
    "search.measure search.study",
    "search.tracking": "search search.stats search.files search.runtimes search.study "
    "search.export",
    "search.compare": "search search.stats search.data search.models search.measure search.study",
    "search.trials": "search search.stats search.files search.data search.models search.runtimes "
    "search.measure search.training search.study",
    "search.commands": "search search.compare search.export search.files search.measure "
    "search.models search.study search.tracking search.training search.trials",
    "clusters": "search search.study search.trials search.commands",
    "dashboards": "search search.stats search.files search.measure search.study search.export "
    "search.tracking search.compare",
    "dashboards.commands": "search search.measure search.study search.export search.tracking "
    "search.compare search.commands dashboards",
    "vitpareto": "methods search search.commands clusters dashboards dashboards.commands",
}
#: rooms that any room outside methods may import
METHODS = ("methods", "methods.engine", "methods.slicing")

#: every package of others and the rooms that import it; no room imports one without being named
OWNERS: dict[str, tuple[str, ...]] = {
    "torch": (
        "methods.engine", "methods.slicing", "methods.token", "methods.structure",
        "methods.controls", "search.data", "search.models", "search.runtimes",
        "search.measure", "search.training", "search.study", "search.export", "search.compare",
        "search.trials",
    ),
    "timm": (
        "methods.engine", "methods.slicing", "methods.structure", "search.data", "search.models",
        "search.measure", "search.training", "search.export", "search.compare",
    ),
    "torchvision": ("search.data",),
    "PIL": ("search.data", "search.export", "search.compare"),
    "safetensors": ("search.models", "search.training", "search.export"),
    "numpy": (
        "search.stats", "search.data", "search.measure", "search.training", "search.study",
        "search.export", "search.tracking", "search.compare", "search.trials", "dashboards",
    ),
    "yaml": ("methods.engine", "search.study", "search.tracking", "clusters"),
    "typer": ("search.commands", "clusters", "dashboards.commands", "vitpareto"),
    "rich": ("search.commands", "clusters", "dashboards"),
    "ray": ("search.trials", "clusters"),
    "optuna": ("search.study",),
    "mlflow": ("search.tracking",),
    "onnx": ("search.export", "search.runtimes"),
    "onnxruntime": ("search.export", "search.runtimes"),
    "fvcore": ("search.measure",),
    "fsspec": ("search.files",),
    "pyarrow": ("search.files",),
    "filelock": ("search.files",),
    "platformdirs": ("search.files",),
    "scipy": ("search.stats",),
    "sqlalchemy": ("search.study",),
    "alembic": ("search.tracking",),
    "pandas": ("search.tracking",),
    "sklearn": ("search.data",),
    "matplotlib": ("dashboards",),
    "plotly": ("dashboards",),
}  # fmt: skip

#: imports of the package's own modules inside a function, outside the commands, and their reasons;
#: a command imports what it runs when it runs, so that the others start fast
LATE: dict[str, str] = {
    "methods/engine/recipe.py": "a recipe made in Python needs no reader of YAML",
    "search/export/bundle.py": "int8 needs onnxruntime's quantizer, which most exports do not use",
    "search/trials/latency_target.py": "measuring in one process needs no Ray",
    "vitpareto/cli.py": "help starts without torch",
}


@dataclass(frozen=True)
class Import:
    """One import statement: of `target` (a dotted module) in `path`, at a line.

    late: inside a function.
    """

    path: Path
    line: int
    target: str
    late: bool = False

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


@functools.cache
def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(p for name in (*FOLDERS, PACKAGE) for p in (ROOT / name).rglob("*.py"))


def module_of(path: Path) -> str:
    """Dotted name without the package, `search.study.job`; `vitpareto.cli` for the root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The longest room that a module lies in."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ALLOWED:
            return ".".join(parts[:length])
    raise AssertionError(f"{module} lies in no room: add its folder to tests/architecture.py")


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, at any depth."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    known = {module_of(p) for p in sources()}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        late = id(node) in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, late)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = str(node.module)
            for alias in node.names:
                full = f"{module}.{alias.name}"
                inner = full.removeprefix(f"{PACKAGE}.")
                yield Import(path, node.lineno, full if inner in known else module, late)


def arrows() -> dict[tuple[str, str], list[Import]]:
    """(room, room that it imports) -> the imports that make it."""
    found: dict[tuple[str, str], list[Import]] = defaultdict(list)
    for path in sources():
        here = room_of(module_of(path))
        for one in imports_of(path):
            if one.target == PACKAGE or not one.target.startswith(f"{PACKAGE}."):
                continue
            inner = one.target.removeprefix(f"{PACKAGE}.")
            there = room_of(inner if inner.split(".")[0] in FOLDERS else one.target)
            if there != here:
                found[here, there].append(one)
    return dict(found)


def packages() -> dict[tuple[str, str], list[Import]]:
    """(package of others, room that imports it) -> the imports."""
    found: dict[tuple[str, str], list[Import]] = defaultdict(list)
    for path in sources():
        for one in imports_of(path):
            top = one.target.partition(".")[0]
            if top != PACKAGE and top not in sys.stdlib_module_names:
                found[top, room_of(module_of(path))].append(one)
    return dict(found)


def allowed(here: str, there: str) -> bool:
    """Whether the list lets room `here` import room `there`."""
    if there in METHODS and not here.startswith("methods"):
        return True
    for name in ALLOWED[here].split():
        if name == there or (name.endswith(".*") and there.startswith(name[:-1])):
            return True
    return False


def main() -> None:
    by_room: dict[str, set[str]] = defaultdict(set)
    for here, there in arrows():
        by_room[here].add(there)
    for room in ALLOWED:
        print(f"{room:<20} -> {', '.join(sorted(by_room[room])) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
