"""A new method is one new file: made-up methods of every kind are searched, exported and verified
in a copy of the package to which nothing but that file was added.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitpareto.search.code_identity import copy_code

SOURCE = Path(__file__).parents[2] / "plugins" / "made_up_methods.py"
NAMES = (
    "made-up-last", "made-up-calibrated", "made-up-gate", "made-up-shared-gate", "made-up-thin",
    "made-up-trained-thin", "made-up-tuned-thin",
)  # fmt: skip

#: What runs in the copy; JOB is the job, and the last line of the output is JSON.
PREPARE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.job_check import check_job

job = json.loads(sys.argv[1])
assert {m for m in methods.names() if m.startswith("made-up")} == set(job["methods"])
checked = check_job(SearchConfig.of(job))
"""

ONE_TRIAL_EACH = (
    PREPARE
    + """
from vitpareto.search.trials.preparations import record_preparations, with_preparations
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

task = study_task(checked, threads=1)
trainer = Worker.open(task).trainer
shared = [n for n in job["methods"] if methods.get(n).needs_preparation]
record_preparations(checked.folder, [trainer.prepare(name) for name in shared])
worker = Worker.open(with_preparations(task))
out = {}
for number, name in enumerate(job["methods"]):
    declared = methods.get(name)
    shape = methods.model_shape(worker.dense)
    recipe = Recipe.of(name, **declared.preset(declared.presets[0], shape))
    result = measure_recipe(worker, number, recipe)
    recorded = checked.folder.artifacts
    weights = result.rebuilt_from.weights
    out[name] = [result.state, weights, weights is not None and recorded.has(weights),
                 sorted(result.provenance.to_json()),
                 result.provenance.to_json().get("prepared", [])]
print(json.dumps(out))
"""
)

SEARCH_AND_EXPORT = (
    PREPARE
    + """
from vitpareto.clusters.connect import local_cluster
from vitpareto.search.export.bundle import export
from vitpareto.search.export.verification import verify
from vitpareto.search.trials.run_study import run_study

lines = []
with local_cluster(2) as capacity:
    folder = run_study(checked, cpus=capacity.cpus, gpus=0, report=lines.append).folder
out = {"states": [r.state for r in folder.trials.all()], "lines": lines}
for name in job["methods"]:
    result = next(r for r in folder.trials.all() if r.method == name and r.state == "finished")
    bundle = export(folder, result, Path(job["store"]) / name, cache=job["cache"], images=8)
    out[name] = verify(bundle).verified
print(json.dumps(out))
"""
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, to which one file was added."""
    root = tmp_path_factory.mktemp("package")
    copy_code(root / "vitpareto")
    shutil.copy(SOURCE, root / "vitpareto" / "methods" / "token" / SOURCE.name)
    return root


def run_in(package: Path, code: str, place: Path, **changed: Any) -> dict[str, Any]:
    job = {
        "name": "s", "store": str(place / "store"), "cache": str(place / "cache"),
        "device": "cpu", "images": 50, "methods": NAMES, "train_epochs": 1, "prepare_epochs": 1,
        "train_batch": 100, "latency": "off", "certify": "off", "race": "off", **changed,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job)],
        cwd=place, env={**os.environ, "PYTHONPATH": str(package)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_made_up_methods_are_prepared_trained_and_measured(package: Path, tmp_path: Path) -> None:
    found = run_in(package, ONE_TRIAL_EACH, tmp_path)
    assert {name: state for name, (state, *_) in found.items()} == dict.fromkeys(NAMES, "finished")
    trained = {name for name, (_, weights, *_) in found.items() if weights}
    in_trial, shared = NAMES[2::3], NAMES[3::3]
    assert trained == {*in_trial, *shared}
    assert all(stored for _, weights, stored, *_ in found.values() if weights)
    # in the trial, and before it
    assert all("training" in found[name][3] for name in in_trial)
    for name in shared:
        assert "training" not in found[name][3]
        assert [use["method"] for use in found[name][4]] == [name]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_made_up_methods_are_searched_exported_and_verified(package: Path, tmp_path: Path) -> None:
    found = run_in(package, SEARCH_AND_EXPORT, tmp_path, trials=12, workers=2)
    assert set(found.pop("states")) == {"finished"}
    lines = found.pop("lines")
    for name in ("made-up-shared-gate", "made-up-tuned-thin"):
        assert any(line.startswith(f"{name}: prepared in") for line in lines), lines
    assert found == dict.fromkeys(NAMES, True)
