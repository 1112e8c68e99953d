"""What a measurement in one process does not import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["measurement", "single_measurement", "early_stopping"])
def test_measuring_imports_neither_ray_nor_optuna_nor_mlflow(module: str) -> None:
    code = (
        f"import sys, vitpareto.search.trials.{module}\n"
        "print(*{'ray', 'optuna', 'mlflow'} & set(sys.modules))"
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
        "            print(os.environ.get('RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'))\n"
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
