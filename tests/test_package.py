"""The house itself: imports run one way, methods need torch and timm alone, and a wheel works."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: who may import whom; a package may always import itself
ALLOWED = {
    "methods": set(),
    "search": {"methods"},
    "clusters": {"search", "methods"},
    "dashboards": {"search", "methods"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py") if package != "." else ROOT.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Names of everything a file imports, at any depth: a package of ours, else top-level."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [str(node.module)]
            if node.module == "vitpareto":
                modules = [f"vitpareto.{alias.name}" for alias in node.names]
        for module in modules:
            top, _, rest = module.partition(".")
            found.add(rest.partition(".")[0] if top == "vitpareto" and rest else top)
    return found


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    ours = {*ALLOWED, "vitpareto", "cli", "tests"}
    for path in sources(package):
        wrong = (imported(path) & ours) - ALLOWED[package] - {package}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_file_of_methods_imports_a_module_of_methods_that_imports_it() -> None:
    """No circles, here where files know each other most."""
    arrows = {}
    for path in sources("methods"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        arrows[f"vitpareto.{name}"] = {
            str(node.module)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            and str(node.module).startswith("vitpareto.methods.")
        }
    done: set[str] = set()
    while arrows:
        free = {name for name, targets in arrows.items() if targets <= done}
        assert free, f"a circle among {sorted(arrows)}"
        done |= free
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


@pytest.mark.parametrize("package", [*ALLOWED, "."])
def test_every_file_says_what_it_is_for(package: str) -> None:
    for path in sources(package):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring and len(docstring.split()) >= 6, path.relative_to(ROOT)


def python(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", code]
    return subprocess.run(  # type: ignore[call-overload]
        arguments, capture_output=True, text=True, timeout=120, check=False, **more
    )


def test_methods_needs_torch_and_timm_alone() -> None:
    """By what its files name, and by what is loaded after using it (PyYAML comes with timm)."""
    for path in sources("methods"):
        beyond = (
            imported(path) - set(sys.stdlib_module_names) - {"methods", "torch", "timm", "yaml"}
        )
        assert not beyond, f"{path.name} imports {beyond}"
    code = """
import sys, timm, torch
from vitpareto import methods
model = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
print(methods.prune(model, "tome", r=13)(torch.zeros(1, 3, 224, 224)).shape)
ours = {"ray", "optuna", "mlflow", "fvcore", "vitpareto.search", "vitpareto.clusters",
        "vitpareto.dashboards", "matplotlib"}
print(sorted(ours & set(sys.modules)))
"""
    done = python(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([1, 1000])", "[]"]


def test_a_wheel_works_elsewhere(tmp_path: Path) -> None:
    """Built, unpacked in an empty folder, and used from there: code, weights, entry point."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(place)
    assert not [n for n in names if n.startswith("tests")]
    code = f"""
import sys
sys.path.insert(0, {str(place)!r})
import vitpareto, vitpareto.cli, vitpareto.clusters.connect, vitpareto.dashboards.front_plot
from vitpareto import methods, search
from vitpareto.search.compare import published
from vitpareto.search.models import embedded_model
for module in (methods, search, vitpareto, vitpareto.clusters, vitpareto.dashboards):
    assert module.__file__.startswith({str(place)!r}), module.__file__
print(embedded_model.build().head.out_features, len(published.rows()), len(methods.names()))
"""
    done = python(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["10", "38"]
    assert {n.split("/")[0].partition("-")[0] for n in names} == {"vitpareto"}
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert "vitpareto = vitpareto.cli:main" in (place / entry).read_text()
