"""What a measurement in one process does not import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

#: what reads studies and measures in one process
MODULES = (
    "study.certificates", "study.verdict", "trials.measurement", "trials.single_measurement",
    "trials.early_stopping",
)  # fmt: skip


def test_measuring_and_reading_import_neither_ray_nor_optuna_nor_mlflow() -> None:
    """The modules one after another: what is not imported after the last was by none of them."""
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(f'vitpareto.search.{name}')\n"
        "    print(*(f'{name}: {m}' for m in ('ray', 'optuna', 'mlflow') if m in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", ["search.trials.run_study", "clusters.connect"])
def test_the_environment_of_ray_is_set_before_ray_is_imported(module: str) -> None:
    """Otherwise Ray listens on a reachable address instead of loopback."""
    code = (
        "import importlib.abc, os, sys\n"
        "class Check(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'ray':\n"
        "            print(os.environ.get('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Check())\n"
        f"import vitpareto.{module}\n"
        "import ray\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]
