"""One trial: build the recipe, measure it on the search images, make the result durable.

`run_trial` does the work and knows no Ray; `RecipeTrial` is the warm Ray actor around it, which
maps weights and images once and is reused from trial to trial.
"""

from __future__ import annotations

import functools
import shutil
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from ray import tune
from torch import nn

import methods
from methods import ModelShape, Recipe
from search.candidates import Made, Trainer, Training
from search.cost import latency, parameters, peak_mb, schedule_macs
from search.datasets import Preprocess, Split
from search.evaluate import DTYPES, batches_of, evaluate
from search.models import MappedModel
from search.results import Latency, TrialResult, pack_bits, wilson_interval
from search.store import StaleWorker, StudyFolder

OUTSIDE = "outside the budget window"
#: where a trial's own training keeps what it resumes from
STATE = "state.pt"


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
    training: Training | None = None


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

    def calibration(self, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """The calibration split's images, normalised, batch after batch; in the study's dtype."""
        batches = batches_of(
            self.task.calibration,
            self.task.preprocess,
            batch=self.task.batch,
            device=self.task.device,
            dtype=DTYPES[self.task.dtype] if dtype is None else dtype,
        )
        return (images for images, _ in batches)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """What makes weights: it works in float32, whatever the study measures in."""
        task = self.task
        assert task.training is not None, "nothing is trained where the job gives no epochs"
        dense = self.dense
        if task.dtype != "float32":
            dense = task.model.load(task.device, torch.float32)
        return Trainer(task.training, dense, task.study.artifacts)

    def make(self, recipe: Recipe) -> Made:
        """The recipe with its weights named, trained here where it has to be (this may take long,
        and goes on where a killed trial of the same candidate stopped).
        """
        training = self.task.training
        if training is None or not training.asks(recipe):
            return Made(recipe, {})
        study = self.task.study
        return self.trainer.make(
            recipe,
            lambda: self.calibration(torch.float32),
            lambda key: study.training(key) / STATE,
        )

    def build(self, recipe: Recipe) -> nn.Module:
        """The candidate, with the study's weights that it names, calibrated on the calibration
        split where its method asks for it.
        """
        weights = None if recipe.weights is None else self.task.study.artifacts.load(recipe.weights)
        return recipe.build(self.dense, calibration=self.calibration(), weights=weights)

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
    made = place.make(recipe)
    model = place.build(made.recipe)
    resolved: Recipe = model.recipe  # type: ignore[assignment]
    key = resolved.key(methods.model_shape(model))
    values = costs_of(model)
    outside = "gmacs" in values and window_violation(values["gmacs"], task.window) > 0
    if outside and resolved != Recipe():
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
            {**before.provenance, **made.record},
        )  # fmt: skip
    result = measure_built(place, trial, model, made.record)
    return replace(result, recipe=recipe.to_dict(), seconds=time.monotonic() - begin)


def costs_of(model: nn.Module) -> dict[str, float]:
    """What is known of a built candidate before it runs: its parameters, and its MACs unless images
    decide them.
    """
    recipe: Recipe = model.recipe  # type: ignore[assignment]
    shape = methods.model_shape(model)
    counts: tuple[int, ...] | None = shape.dense_counts()
    if recipe.tokens is not None:
        counts = recipe.tokens.declared.counts(recipe.tokens.params, shape)
    values = {"params_m": parameters(model) / 1e6}
    if counts is not None:
        values["gmacs"] = schedule_macs(recipe, shape, counts) / 1e9
    return values


def measure_built(
    place: Workplace, trial: int, model: nn.Module, record: dict[str, Any]
) -> TrialResult:
    """A built candidate measured on all search images; its recipe as asked for is the resolved one.

    record: how it came by its weights, for the result's provenance.
    """
    task, begin = place.task, time.monotonic()
    resolved: Recipe = model.recipe  # type: ignore[assignment]
    values = costs_of(model)
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
        trial, "finished", resolved.to_dict(), resolved.key(methods.model_shape(model)), values,
        resolved.to_dict(), len(seen.top1), pack_bits(seen.top1), low, high,
        time.monotonic() - begin, "", {**task.provenance, **record},
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
        # its result is durable: nothing has to go on from where its training stood
        shutil.rmtree(study.training(str(self.asked["key"])), ignore_errors=True)
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
