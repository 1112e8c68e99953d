"""A worker that sleeps where others measure: what the driver of a search costs, at any size.

It keeps what a real trial keeps (a durable result of the usual size, reported rung by rung) and
computes nothing. Everything else of a search is the real thing: searcher, storage, tracking, Ray.
It loads no torch, so that one machine holds many of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits


@dataclass(frozen=True)
class ResultFolder:
    """A study's folder; a result is kept there as `StudyFolder.write` does."""

    folder: Path

    def write(self, result: TrialResult, epoch: str) -> None:
        assert (self.folder / "epoch").read_text(encoding="utf-8") == epoch
        path = self.folder / "trials" / f"{result.trial:06d}.json"
        write_atomic(path, json.dumps(result.to_json()))
        with contextlib.suppress(FileExistsError):
            os.link(path, self.folder / "by_key" / f"{result.key}.json")


@dataclass(frozen=True)
class Sleep:
    """What every trial does. study: where results go; seconds: of a trial measured in full, the
    same part of it for every part of the images; rungs: as `search.trials.task.TrialTask.rungs`.
    """

    study: ResultFolder
    epoch: str
    images: int
    seconds: float
    rungs: tuple[int, ...] = ()


def pretended(recipe: dict[str, Any], key: str, images: int) -> tuple[float, np.ndarray]:
    """GMACs and correctness that a recipe is said to have: more of the one, more of the other."""
    draw = np.random.default_rng(int(key[:8], 16))
    gmacs = float(draw.uniform(0.2, 1.0)) if recipe else 1.0
    chance = 0.9 if not recipe else 0.9 - 0.5 * (1 - gmacs) ** 2 - 0.3 * draw.uniform() ** 2
    return gmacs, draw.random(images) < chance


class SleepingTrial(tune.Trainable):
    """In the place of `search.trials.trial_actor.TrialActor`."""

    def setup(self, config: dict[str, Any], task: Sleep | None = None) -> None:
        assert task is not None
        self.task = task
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.asked, self.seen, self.begin = new_config, 0, time.time()
        return True

    def step(self) -> dict[str, Any]:
        task, trial, key = self.task, int(self.asked["trial"]), str(self.asked["key"])
        plain = self.asked["recipe"]
        recipe = RecordedRecipe.from_json(plain)
        gmacs, right = pretended(plain, key, task.images)
        stop = next((n for n in task.rungs if n > self.seen), task.images)
        time.sleep(task.seconds * (stop - self.seen) / task.images)
        self.seen = stop
        top1 = 100 * float(right[:stop].mean())
        values = {"top1": top1, "top5": top1, "gmacs": gmacs, "params_m": 1.0, "peak_mb": 1.0}
        if stop < task.images:
            from vitpareto.search.study.rungs import RungReport
            from vitpareto.search.trials.trial_actor import RUNG

            seconds = time.time() - self.begin
            rung = RungReport(key, recipe, values, right[:stop], seconds=seconds)
            return {"done": False, "top1": top1, RUNG: rung}
        low, high = wilson_interval(int(right.sum()), task.images)
        result = TrialResult(
            trial, "finished", recipe, key, values, recipe, task.images, pack_bits(right),
            low, high, time.time() - self.begin,
        )  # fmt: skip
        task.study.trials.write(result, task.epoch)
        return {"done": True, "trial_number": trial, "top1": top1}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""
