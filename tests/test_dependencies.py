"""Every imported package is declared, in a range that contains the tested version."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDERS = ("methods", "search", "clusters", "dashboards", "vitpareto")
#: declared and not imported: torch.onnx imports onnxscript
INDIRECT = {"onnxscript"}
#: distributions that another one, which is declared, installs and whose package it shares
SHIPPED_WITH = {"mlflow-skinny": "mlflow", "mlflow-tracing": "mlflow"}


def declared(extra: str | None = None) -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    requirements = map(Requirement, lines)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def imported(folder: str) -> set[str]:
    """Top-level names of all third-party imports, at any depth of a file."""
    found: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        if "benchmarks" in path.parts:  # scripts that import their neighbours
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"vitpareto", "tests"}


def distributions(names: set[str]) -> set[str]:
    """The distributions that provide these top-level packages."""
    known = packages_distributions()
    found = set()
    for name in names:
        assert name in known, f"{name} is imported and no installed distribution provides it"
        candidates = {canonicalize_name(each) for each in known[name]}
        found.add(min(SHIPPED_WITH.get(each, each) for each in candidates))
    return found


def test_imports_and_declared_dependencies_are_the_same() -> None:
    used = distributions(set().union(*map(imported, FOLDERS)))
    wanted = set(declared())
    assert used - wanted == set(), "imported and not declared in pyproject.toml"
    assert wanted - used == INDIRECT, "declared and not imported"


def test_what_the_tests_import_is_declared() -> None:
    used = distributions(imported("tests"))
    assert used - set(declared()) - set(declared("test")) == set()


def test_ranges_are_capped_and_contain_the_tested_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    tested = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    for name, requirement in declared().items():
        assert name in tested, f"{name} is not in constraints.txt"
        assert tested[name] in requirement.specifier, f"{requirement}: {tested[name]}"
        operators = {each.operator for each in requirement.specifier}
        assert operators & {"<", "<=", "==", "~="}, f"{requirement} has no upper bound"
