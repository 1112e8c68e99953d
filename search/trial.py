"""One trial: build the recipe, measure it on the search images, make the result durable.

`run_trial` does the work and knows no Ray; `RecipeTrial` is the warm Ray actor around it, which
maps weights and images once and is reused from trial to trial.
"""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ray import tune
from torch import nn

import methods
from methods import ModelShape, Recipe
from search.cost import latency, parameters, peak_mb, schedule_macs
from search.datasets import Preprocess, Split
from search.evaluate import DTYPES, batches_of, evaluate
from search.models import MappedModel
from search.results import Latency, TrialResult, pack_bits, wilson_interval
from search.store import StaleWorker, StudyFolder

OUTSIDE = "outside the budget window"


@dataclass(frozen=True)
class Task:
    """What all trials of a study share; pickles small, images and weights travel as paths."""

    study: StudyFolder
    epoch: str
    model: MappedModel
    search: Split
    calibration: Split
    preprocess: Preprocess
    head_indices: tuple[int, ...] | None
    device: str
    dtype: str
    batch: int
    threads: int | None
    window: tuple[float | None, float | None]
    latency_batch: int | None
    provenance: dict[str, Any]


@dataclass
class Workplace:
    """A task's model and images mapped into this process, for as many trials as come."""

    task: Task
    dense: nn.Module
    shape: ModelShape

    @classmethod
    def open(cls, task: Task) -> Workplace:
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        dense = task.model.load(task.device, DTYPES[task.dtype])
        return cls(task, dense, methods.model_shape(dense))

    def build(self, recipe: Recipe) -> nn.Module:
        """The candidate, calibrated on the calibration split where its method asks for it."""
        batches = batches_of(
            self.task.calibration,
            self.task.preprocess,
            batch=self.task.batch,
            device=self.task.device,
            dtype=DTYPES[self.task.dtype],
        )
        return recipe.build(self.dense, calibration=(images for images, _ in batches))

    def images(self, count: int) -> torch.Tensor:
        """A batch of `count` search images (repeated where there are fewer)."""
        raw, _ = self.task.search.batch(0, min(count, len(self.task.search)))
        images = self.task.preprocess.normalise(raw.to(self.task.device), DTYPES[self.task.dtype])
        return images[torch.arange(count, device=images.device) % len(images)]


def window_violation(gmacs: float, window: tuple[float | None, float | None]) -> float:
    """How far outside the budget window, in GMACs; <= 0 inside."""
    low, high = window
    worst = float("-inf")
    if low is not None:
        worst = max(worst, low - gmacs)
    if high is not None:
        worst = max(worst, gmacs - high)
    return worst if worst > float("-inf") else 0.0


def run_trial(place: Workplace, trial: int, recipe: Recipe) -> TrialResult:
    """Measure one recipe on all search images. Raises whatever the recipe raises."""
    task, begin = place.task, time.monotonic()
    model = place.build(recipe)
    resolved: Recipe = model.recipe  # type: ignore[assignment]
    shape = methods.model_shape(model)
    key = resolved.key(shape)
    counts: tuple[int, ...] | None = shape.dense_counts()
    if resolved.tokens is not None:
        counts = resolved.tokens.declared.counts(resolved.tokens.params, shape)
    values = {"params_m": parameters(model) / 1e6}
    if counts is not None:
        values["gmacs"] = schedule_macs(resolved, shape, counts) / 1e9
        if resolved != Recipe() and window_violation(values["gmacs"], task.window) > 0:
            return TrialResult(
                trial, "failed", recipe.to_dict(), key, values, resolved.to_dict(), reason=OUTSIDE
            )
    before = task.study.known(key)
    if before is not None:
        # calibration can lead two settings to the same counts: the same candidate, measured once
        return TrialResult(
            trial, "finished", recipe.to_dict(), key, before.values, resolved.to_dict(),
            before.images, before.bits, before.top1_low, before.top1_high,
            time.monotonic() - begin, f"the same candidate as trial {before.trial}",
            before.provenance,
        )  # fmt: skip
    seen = evaluate(
        model,
        task.search,
        task.preprocess,
        batch=task.batch,
        device=task.device,
        dtype=DTYPES[task.dtype],
        head_indices=task.head_indices,
    )
    if seen.macs is not None and seen.macs_mean is not None:
        values["gmacs"], values["gmacs_mean"] = seen.macs / 1e9, seen.macs_mean / 1e9
    values["top1"] = 100 * float(np.mean(seen.top1))
    values["top5"] = 100 * float(np.mean(seen.top5))
    values["peak_mb"] = peak_mb(model, place.images(min(task.batch, len(task.search))))
    timed: Latency | None = None
    if task.latency_batch is not None:
        timed = latency(model, place.dense, place.images(task.latency_batch))
        values["latency_ms"] = drift_free_ms(timed, task.study.result(0))
        values["images_per_s"] = 1e3 * task.latency_batch / values["latency_ms"]
    low, high = wilson_interval(int(seen.top1.sum()), len(seen.top1))
    return TrialResult(
        trial, "finished", recipe.to_dict(), key, values, resolved.to_dict(), len(seen.top1),
        pack_bits(seen.top1), low, high, time.monotonic() - begin, "", task.provenance,
        None if timed is None else asdict(timed),
    )  # fmt: skip


def drift_free_ms(timed: Latency, reference: TrialResult | None) -> float:
    """Milliseconds a batch as an objective: the reference's dense p50 over this trial's speed-up.

    A trial's own p50 says as much of the machine's hour as of the recipe; candidate and dense were
    timed in turn, so their ratio does not. Trial 0 has no reference yet: its own p50.
    """
    base = None if reference is None else reference.timed
    return timed.p50_ms if base is None else base.p50_ms / timed.speedup


class RecipeTrial(tune.Trainable):
    """The Ray trainable: one step is one trial, and the actor stays warm for the next."""

    def setup(self, config: dict[str, Any], task: Task | None = None) -> None:
        assert task is not None, "tune.with_parameters gives the task"
        self.place = Workplace.open(task)
        self.asked = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.asked = new_config
        return True

    def step(self) -> dict[str, Any]:
        """The result is on disk before Ray, and so anybody, hears of it."""
        trial, study = int(self.asked["trial"]), self.place.task.study
        recipe = Recipe.from_dict(self.asked["recipe"])
        try:
            result = run_trial(self.place, trial, recipe)
        except (StaleWorker, torch.AcceleratorError):
            raise  # a GPU in an error state fails everything after it: this worker must end
        except Exception as error:  # a recipe that raises is a failed trial, not a failed worker
            trace = "".join(traceback.format_exception(error))[-4000:]
            result = TrialResult(
                trial,
                "failed",
                recipe.to_dict(),
                str(self.asked["key"]),
                reason=f"{type(error).__name__}: {error}",
                provenance={**self.place.task.provenance, "traceback": trace},
            )
        if result.reason != OUTSIDE:
            study.write(result, self.place.task.epoch)
        return {
            "done": True,
            "trial_number": trial,
            "outside": result.reason == OUTSIDE,
            "top1": result.values.get("top1", 0.0),
            "gmacs": result.values.get("gmacs", 0.0),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep: the result file is the state."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""
