"""What a measurement in one process does not import."""

from __future__ import annotations

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
