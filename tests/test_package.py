"""What is installed: one import name, all code and data, and methods that need torch and timm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import vitpareto
from tests.architecture import FOLDERS, ROOT, imports_of, sources


def python(code: str, executable: Path | str = sys.executable, **more: object) -> str:
    """Standard output of a program; it must succeed."""
    done = subprocess.run(  # type: ignore[call-overload]
        [executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, **more
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_methods_needs_torch_and_timm_alone(tmp_path: Path) -> None:
    """By what its files name, and by what is loaded after using it. Only YAML text needs PyYAML."""
    allowed = {*sys.stdlib_module_names, "vitpareto", "torch", "timm"}
    for path in (p for p in sources() if p.is_relative_to(ROOT / "methods")):
        more = {"yaml"} if path.name == "recipe_yaml.py" else set()
        for one in imports_of(path):
            assert one.target.split(".")[0] in allowed | more, one
            assert one.target.split(".")[1:2] in ([], ["methods"]) or not one.target.startswith(
                "vitpareto."
            ), one
    code = """
import sys
sys.modules["yaml"] = None  # an import of it fails
import timm, torch, vitpareto
model = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
print(vitpareto.prune(model, "tome", r=13)(torch.zeros(1, 3, 224, 224)).shape)
heavy = {"ray", "optuna", "mlflow", "fvcore", "vitpareto.search", "vitpareto.clusters",
         "vitpareto.dashboards", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
print(" ".join(vitpareto.methods.names()))
try:
    vitpareto.Recipe.of("tome", r=13).to_yaml()
except ImportError as error:
    print(error.name)
"""
    registered = " ".join(vitpareto.methods.names())
    lines = ["torch.Size([1, 1000])", "[]", registered, "yaml"]
    # huggingface_hub, which timm imports, reports the missing PyYAML first
    assert python(code, cwd=tmp_path).splitlines()[-4:] == lines


def test_the_public_face() -> None:
    """Every public name exists; nothing else is promised."""
    assert sorted(vitpareto.__all__) == dir(vitpareto)
    for name in vitpareto.__all__:
        assert getattr(vitpareto, name) is not None
    assert vitpareto.prune is vitpareto.methods.prune
    with pytest.raises(AttributeError, match="prun"):
        _ = vitpareto.prun
    assert {*FOLDERS} < {*vitpareto.__all__}


def test_the_command_starts_without_torch() -> None:
    code = "import sys, vitpareto.cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    python(code)


def test_a_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    """It installs one package, `vitpareto`, and the command; code, data and types are complete."""
    source = tmp_path / "source"
    for name in (*FOLDERS, "vitpareto"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=False)
    own = tmp_path / "empty" / "bin" / "python"
    place = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", own).strip())
    before = {path.name for path in place.iterdir()}
    subprocess.run(
        [sys.executable, "-m", "pip", f"--python={own}", "install", "--no-deps", "--no-index",
         "--quiet", "--disable-pip-version-check", wheel],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    version = vitpareto.__version__
    new = {path.name for path in place.iterdir()} - before
    assert new == {"vitpareto", f"vitpareto-{version}.dist-info"}
    inside = {path.name for path in (place / "vitpareto").iterdir() if path.is_dir()}
    assert inside - {"__pycache__"} == {*FOLDERS}
    assert (place / "vitpareto" / "py.typed").is_file()
    files = {
        path.relative_to(place / "vitpareto").as_posix()
        for path in (place / "vitpareto").rglob("*.py")
    }
    expected = {path.relative_to(ROOT).as_posix().removeprefix("vitpareto/") for path in sources()}
    assert files == expected
    # the other packages come from this environment, the code from the empty one
    code = f"""
import sys
from vitpareto import clusters, dashboards, methods, search
from vitpareto.search.compare import published
from vitpareto.search.models import embedded_model
for module in (methods, search, clusters, dashboards, published):
    assert module.__file__.startswith({str(place)!r}), module.__file__
print(embedded_model.build().head.out_features, len(published.rows()), len(methods.names()))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *_libraries()])}
    printed = python(code, own, cwd=tmp_path, env=environment).split()
    assert printed[:2] == ["10", "38"]
    command = own.with_name("vitpareto")
    shown = subprocess.run(
        [command, "--version"], env=environment, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == version


def _libraries() -> list[str]:
    """Where this environment's packages lie, without an editable install of ours."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))] or [
        sysconfig.get_path("purelib")
    ]
