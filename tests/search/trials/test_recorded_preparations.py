"""Preparations that version 0.1.0 stored are found again, by the same keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vitpareto.methods.engine.preparation import PreparationOutcome, SharedWeights
from vitpareto.methods.slicing.snapshots import TrajectorySnapshots
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.training.preparation_cache import CachedPreparation, key_of, prepare_once
from vitpareto.search.trials import candidates
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.preparations import (
    preparation_summary,
    structural_outcomes,
)
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

RECORDED = Path(__file__).parents[2] / "golden" / "preparations"
#: the job that version 0.1.0 ran
JOB = {
    "name": "s", "device": "cpu", "seed": 3, "methods": ["patchmerger", "tnt", "nvit"],
    "train_epochs": 1, "prepare_epochs": 1, "lr": 1e-3, "images": 50, "train_batch": 100,
    "space": {"nvit.cost": [0.85, 0.9]},
}  # fmt: skip
KEYS = {"tnt": "1aa4f5f46503f059", "nvit": "25cbeee50005eeaf"}


def recorded_inputs(method: str) -> dict[str, Any]:
    return dict(json.loads((RECORDED / KEYS[method] / "what.json").read_text()))


def never(progress: Path, weights: object) -> PreparationOutcome:
    raise AssertionError("the preparation is trained again")


@pytest.mark.parametrize("method", KEYS)
def test_the_hash_of_recorded_inputs_is_the_recorded_key(method: str, tmp_path: Path) -> None:
    inputs = recorded_inputs(method)
    assert inputs.pop("schema") == 1 and inputs["method"] == method
    assert key_of(inputs) == KEYS[method]
    shutil.copytree(RECORDED / KEYS[method], tmp_path / ".prepared" / KEYS[method])
    found = prepare_once(tmp_path, method, inputs, never)
    assert (found.fresh, found.key) == (False, KEYS[method])


def test_a_job_gives_the_recorded_inputs(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def capture(
        store: Path, method: str, inputs: dict[str, Any], train: object
    ) -> CachedPreparation | None:
        asked[method] = json.loads(json.dumps({"schema": 1, "method": method, **inputs}))
        return None

    monkeypatch.setattr(candidates, "prepare_once", capture)
    job = {**JOB, "store": str(tmp_path), "cache": str(cache)}
    checked = check_job(SearchConfig.of(job))
    trainer = Worker.open(study_task(checked, threads=1)).trainer
    for method in KEYS:
        trainer.prepare(method)
        # torch and timm are part of the key, and may be newer
        expected = {**recorded_inputs(method), "versions": asked[method]["versions"]}
        assert asked[method] == expected
        assert set(recorded_inputs(method)["versions"]) == set(asked[method]["versions"])


def test_a_recorded_study_keeps_its_outcomes(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    study.folder.mkdir()
    shutil.copy(RECORDED / "prepared.json", study.folder)
    data = json.loads((RECORDED / "prepared.json").read_text())
    records = study.preparations.read()
    assert [r.to_json() for r in records] == data
    heads, trajectory = (r.outcome for r in records)
    assert isinstance(heads, SharedWeights) and isinstance(trajectory, TrajectorySnapshots)
    assert structural_outcomes(study) == {"nvit": trajectory}
    assert trajectory.weights_for({"target": 0.9}) == "63ffec2b81eb9780"
    lines = preparation_summary(study, [])
    assert [line.split()[0] for line in lines] == ["tnt", "nvit"]
