"""Ray's workers under a search: each of them is warm, busy, and reused."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import tune
from timm.models.vision_transformer import VisionTransformer

from tests.refusals import refused
from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.methods import Code
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.trials import study_task
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.searcher import FrontSearcher
from vitpareto.search.trials.tune import run_tune

TRIALS = 20
#: trials that one worker may do while the other starts
ALONE = 8


def worker_that_starts_slowly() -> type[tune.Trainable]:
    """Starting takes longer than several trials, as in a process that imports torch and loads a
    model. After ALONE trials a worker waits for another one, so that a busy machine, on which
    starting takes longer still, gives the same result. A local class travels by value.
    """

    class Slow(tune.Trainable):
        def setup(self, config: dict[str, Any], task: Any = None) -> None:
            time.sleep(1.0)
            self.folder, self.asked, self.done = task.study, config, 0
            self.started = self.folder.folder / "started"
            self.started.mkdir(exist_ok=True)
            (self.started / str(os.getpid())).touch()

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.asked = new_config
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(0.4)
            self.done += 1
            deadline = time.monotonic() + 200
            while self.done == ALONE and time.monotonic() < deadline:
                if len([*self.started.iterdir()]) > 1:
                    break
                time.sleep(0.05)
            trial, recipe = self.asked["trial"], RecordedRecipe.from_json(self.asked["recipe"])
            values = {"top1": 50.0 + trial, "gmacs": 1.0 + trial}
            result = TrialResult(
                trial, "finished", recipe, self.asked["key"], values, recipe, 8,
                pack_bits([True] * 8), provenance=Provenance(extra={"pid": os.getpid()}),
            )  # fmt: skip
            self.folder.trials.write(result)
            return {"done": True, "trial_number": trial}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return Slow


@pytest.mark.timeout(600)
def test_workers_that_start_slowly_all_get_trials(tmp_path: Path, capacity: Any) -> None:
    """Ray alone gives a free worker to the trial that waits for its own, and ends the one that is
    being started: of two workers one would do all trials.
    """
    folder = StudyFolder(tmp_path / "study")
    folder.create()
    model = VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=12, num_heads=2, num_classes=10
    )
    with torch.no_grad():
        space = Space.of(("random", "tome", "topk"), {}, {})
        settings = SessionSettings(("top1", "gmacs"), sampler="random", seed=0, trials=TRIALS)
        session = StudySession(folder, space, settings, shape_of=ShapeFinder(model.eval()))
        searcher = FrontSearcher(session)
        errand: Any = SimpleNamespace(study=folder)
        trainable = tune.with_parameters(worker_that_starts_slowly(), task=errand)
        run_tune(searcher, trainable, TrialResources(2, 1, 0.0))
    done = Counter(r.provenance.extra["pid"] for r in folder.trials.all())
    assert sum(done.values()) == TRIALS == searcher.progress.done
    first, second, *_ = (*(count for _, count in done.most_common(2)), 0, 0)
    assert second >= 4, f"trials by worker: {dict(done)}"
    assert first + second == TRIALS, f"workers were started again: {dict(done)}"


def test_a_worker_with_other_code_ends_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    """The refusal of a worker is the search's; the same study continues once the code is equal."""
    config = SearchConfig.of(
        {"name": "s", "trials": 3, "methods": "topk", "images": 40, "store": str(tmp_path),
         "cache": str(cache), "workers": 1, "latency": "off", "certify": "off"}
    )  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(study_task, "CODE", "another")
        with refused(Code.MISMATCH, expected="another"):
            run_study(check_job(config), cpus=1, gpus=0)
    outcome = run_study(check_job(config), cpus=1, gpus=0)
    assert [r.state for r in outcome.folder.trials.all()] == ["finished"] * 3
