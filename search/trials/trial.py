"""One trial: build the recipe, measure it rung by rung, make the result durable.

`climb` does the work and knows no Ray; `RecipeTrial` is the warm Ray actor around it, which maps
weights and images once and is reused from trial to trial. Whether a trial climbs on is decided
elsewhere (`search.trials.early_stopping`).
"""

from __future__ import annotations

import functools
import os
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from torch import nn

from vitpareto import methods
from vitpareto.methods import Code, ModelShape, Recipe
from vitpareto.search.code_identity import describe_code
from vitpareto.search.data.datasets import Data, Preprocess, Split
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import delete_tree
from vitpareto.search.files.object_store import store_folder
from vitpareto.search.measure.accuracy import DTYPES, Correctness, batches_of, evaluate, fitting
from vitpareto.search.measure.cost import (
    device_name,
    latency,
    parameters,
    peak_mb,
    recipe_macs,
    schedule_macs,
)
from vitpareto.search.measure.latency import Latency
from vitpareto.search.models.loading import MappedModel
from vitpareto.search.runtimes.backends import Run, prepared
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study.folder import StaleWorker, StudyFolder
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.trials.candidates import CandidateTrainer, StudyTraining, TrainedRecipe
from vitpareto.search.trials.nodes import split_here

OUTSIDE = "outside the budgets"
#: where a trial's own training keeps what it resumes from
STATE = "state.pt"
#: how the result of one that was measured before begins its reason
SAME = "the same candidate as trial"
#: under which a report to Ray carries its `Rung`
RUNG = "rung"


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
    timed_batch: int
    times_trials: bool
    provenance: dict[str, Any]
    runtime: str = "eager"
    #: the dearest latency that counts as inside, where there is such a limit
    max_latency_ms: float | None = None
    training: StudyTraining | None = None
    #: numbers of search images after which racing looks; () measures all in one go
    rungs: tuple[int, ...] = ()
    #: peak memory is an objective, so that racing has to know it
    peak_first: bool = False
    #: the store's address, where it is no folder that all nodes see (`search.files.object_store`)
    store: str | None = None
    #: the images before they are decoded, for nodes that see no folder of the driver's
    data: Data | None = None
    #: the actor that measures latencies, where they hold for another device than the trial's
    timer: Any = None
    #: fingerprint of the driver's code (`code_identity.code_fingerprint`)
    code: str = ""

    @property
    def splits(self) -> tuple[Split, ...]:
        """What a worker maps."""
        trained = () if self.training is None else (self.training.split,)
        return (self.search, self.calibration, *trained)

    def here(self) -> Task:
        """The same with study and images as they lie on this node (`nodes.split_here`)."""
        task = self
        if task.store is not None:
            study = StudyFolder(store_folder(task.store) / task.study.name)
            study.folder.mkdir(parents=True, exist_ok=True)
            training = task.training
            if training is not None:
                training = replace(training, store=study.folder.parent)
            model = replace(task.model, weights=study.weights)
            task = replace(task, study=study, model=model, training=training)
        if task.data is None:
            return task
        search, calibration = (split_here(s, task.data) for s in (task.search, task.calibration))
        training = task.training
        if training is not None:
            split = split_here(training.split, task.data)
            training = replace(training, split=split, calibration=calibration)
        return replace(task, search=search, calibration=calibration, training=training)


@dataclass
class Worker:
    """A task's model and images mapped into this process, for as many trials as come."""

    task: Task
    dense: nn.Module
    shape: ModelShape

    @classmethod
    def open(cls, task: Task) -> Worker:
        """Raises UserError where this process's code or images are not the study's."""
        check_own_code(task.code)
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        made_on = {**task.provenance, "device": device_name(task.device)}
        task = replace(task.here(), provenance=made_on)
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
    def dense_run(self) -> Run:
        """The dense model in the runtime of the task's latencies."""
        return prepared(self.dense, self.images(self.task.timed_batch), self.task.runtime)

    def timed(self, model: nn.Module) -> Latency:
        """A candidate beside the dense model, in the task's runtime and at its batch; on the
        target's device, where the job names one.
        """
        if self.task.timer is not None:
            recipe: Recipe = model.recipe  # type: ignore[assignment]
            found: Latency = ray.get(self.task.timer.timed.remote(recipe.to_dict()))
            return found
        images, runtime = self.images(self.task.timed_batch), self.task.runtime
        return latency(prepared(model, images, runtime), self.dense_run, images, runtime=runtime)

    @functools.cached_property
    def trainer(self) -> CandidateTrainer:
        """What makes weights: it works in float32, whatever the study measures in."""
        task = self.task
        assert task.training is not None, "nothing is trained where the job gives no epochs"
        dense = self.dense
        if task.dtype != "float32":
            dense = task.model.load(task.device, torch.float32)
        return CandidateTrainer(task.training, dense, task.study.artifacts)

    def make(self, recipe: Recipe) -> TrainedRecipe:
        """The recipe with its weights named, trained here where it has to be (this may take long,
        and goes on where a killed trial of the same candidate stopped).
        """
        training = self.task.training
        if training is None or not training.needs_weights(recipe):
            return TrainedRecipe(recipe, {})
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


def check_own_code(expected: str) -> None:
    """Raises UserError if this process runs other code than the driver."""
    found, folder = describe_code()
    if expected and found != expected:
        raise UserError(
            f"worker {os.getpid()} on {socket.gethostname()} runs other code than the driver: "
            f"{folder} with fingerprint {found or 'none'}, the driver's is {expected}. Install the "
            "same vitpareto on every node",
            Code.MISMATCH,
            expected=expected,
            got=found,
            folder=folder,
        )


def outside_by(result: TrialResult, task: Task) -> float:
    """How far outside a measured candidate is: in GMACs, or where its MACs are inside, by what part
    of the limit its latency is above that; <= 0 inside.
    """
    macs = window_violation(result.values["gmacs"], task.window) if "gmacs" in result.values else 0
    if macs > 0 or task.max_latency_ms is None:
        return macs
    return result.values.get("latency_ms", 0.0) / task.max_latency_ms - 1


def window_violation(gmacs: float, window: tuple[float | None, float | None]) -> float:
    """How far outside the budget window, in GMACs; <= 0 inside."""
    low, high = window
    worst = float("-inf")
    if low is not None:
        worst = max(worst, low - gmacs)
    if high is not None:
        worst = max(worst, gmacs - high)
    return worst if worst > float("-inf") else 0.0


@dataclass(frozen=True)
class Rung:
    """How far a trial has climbed: what racing looks at before it climbs on.

    key, resolved: the candidate's, calibrated. values: its costs as far as they are known, and
    top1, the mean of the images seen. right: bool [n], their correctness. macs_each: [n], where
    images decide the cost, which may yet come to anything within `bounds` an image. record: how it
    came by its weights.
    """

    key: str
    resolved: dict[str, Any]
    values: dict[str, float]
    # Ray formats every report for its debug log, shown or not
    right: np.ndarray = field(repr=False)
    macs_each: np.ndarray | None = field(default=None, repr=False)
    bounds: tuple[float, float] = (0.0, 0.0)
    record: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def climb(place: Worker, trial: int, recipe: Recipe) -> Iterator[Rung | TrialResult]:
    """Measure one recipe, rung by rung of the task: a `Rung` after each but the last, then the
    result. Raises whatever the recipe raises.
    """
    task, begin = place.task, time.monotonic()
    made = place.make(recipe)
    model = place.build(made.recipe)
    resolved: Recipe = model.recipe  # type: ignore[assignment]
    key = resolved.key(methods.model_shape(model))
    values = costs_of(model)
    outside = "gmacs" in values and window_violation(values["gmacs"], task.window) > 0
    if outside and resolved != Recipe():
        yield TrialResult(
            trial, "failed", recipe.to_dict(), key, values, resolved.to_dict(), reason=OUTSIDE
        )
        return
    before = task.study.known(key)
    if before is not None:
        # calibration can lead two settings to the same counts: the same candidate, measured once
        yield TrialResult(
            trial, before.state, recipe.to_dict(), key, before.values, resolved.to_dict(),
            before.images, before.bits, before.top1_low, before.top1_high,
            time.monotonic() - begin, f"{SAME} {before.trial}",
            {**before.provenance, **made.record},
        )  # fmt: skip
        return
    for step in measuring(place, trial, model, made.record, task.rungs):
        seconds = time.monotonic() - begin
        if isinstance(step, Rung):
            yield replace(step, seconds=seconds)
        else:
            yield replace(step, recipe=recipe.to_dict(), seconds=seconds)


def run_trial(place: Worker, trial: int, recipe: Recipe) -> TrialResult:
    """Measure one recipe on all search images, whatever the rungs say of it."""
    *_, result = climb(place, trial, recipe)
    assert isinstance(result, TrialResult)
    return result


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
    place: Worker, trial: int, model: nn.Module, record: dict[str, Any]
) -> TrialResult:
    """A built candidate measured on all search images; its recipe as asked for is the resolved one.

    record: how it came by its weights, for the result's provenance.
    """
    *_, result = measuring(place, trial, model, record, ())
    assert isinstance(result, TrialResult)
    return result


def measuring(
    place: Worker, trial: int, model: nn.Module, record: dict[str, Any], rungs: tuple[int, ...]
) -> Iterator[Rung | TrialResult]:
    """A `Rung` after each of these numbers of search images, then the result on all of them.

    Costs that are measured (latency, peak memory) come first where they are objectives, and
    otherwise last, so that a trial that is stopped does not pay for them. Where memory does not
    suffice the batch is halved, and `record` says to what ("batch").
    """
    task, begin = place.task, time.monotonic()
    resolved: Recipe = model.recipe  # type: ignore[assignment]
    shape, whole = methods.model_shape(model), len(task.search)
    key, values = resolved.key(shape), costs_of(model)
    adaptive, bounds = "gmacs" not in values, (0.0, 0.0)
    if adaptive:
        bounds = recipe_macs(resolved, shape)
        # padding is part of the cost: the batches are those of a trial without rungs
        rungs = tuple(-(-n // task.batch) * task.batch for n in rungs)
    timed: Latency | None = None
    if task.times_trials:
        timed = place.timed(model)
        values["latency_ms"] = drift_free_ms(timed, task.study.result(0))
        values["images_per_s"] = 1e3 * task.timed_batch / values["latency_ms"]
        limit = task.max_latency_ms
        if limit is not None and values["latency_ms"] > limit and resolved != Recipe():
            yield TrialResult(
                trial, "failed", resolved.to_dict(), key, values, resolved.to_dict(),
                reason=OUTSIDE,
            )  # fmt: skip
            return

    def peak(batch: int) -> float:
        return peak_mb(model, place.images(min(batch, whole)))

    batch = task.batch
    if task.peak_first:
        batch, values["peak_mb"] = fitting(batch, peak)
    seen: Correctness | None = None
    for stop in (*sorted({n for n in rungs if n < whole}), whole):
        climb_on = functools.partial(_climb_on, place, model, seen, stop, batch, adaptive)
        batch, now = fitting(batch, climb_on)
        seen = now
        if now.macs is not None and now.macs_mean is not None:
            values["gmacs"], values["gmacs_mean"] = now.macs / 1e9, now.macs_mean / 1e9
        values["top1"] = 100 * float(np.mean(now.top1))
        values["top5"] = 100 * float(np.mean(now.top5))
        if stop < whole:
            # a stopped trial's result is written by the driver, which may have another device
            made = {"device": task.provenance["device"], **record}
            if batch != task.batch:
                made["batch"] = batch
            yield Rung(key, resolved.to_dict(), dict(values), now.top1, now.macs_each, bounds, made)
    assert seen is not None
    if not task.peak_first:
        batch, values["peak_mb"] = fitting(batch, peak)
    if batch != task.batch:
        record = {**record, "batch": batch}
    low, high = wilson_interval(int(seen.top1.sum()), whole)
    yield TrialResult(
        trial, "finished", resolved.to_dict(), key, values,
        resolved.to_dict(), whole, pack_bits(seen.top1), low, high,
        time.monotonic() - begin, "", {**task.provenance, **record},
        None if timed is None else asdict(timed),
    )  # fmt: skip


def _climb_on(
    place: Worker,
    model: nn.Module,
    seen: Correctness | None,
    stop: int,
    before: int,
    adaptive: bool,
    batch: int,
) -> Correctness:
    """What was seen, and the images up to `stop`. before: the batch of what was seen. Padding is
    part of an input-adaptive cost, so that all of its batches are of one size.
    """
    task = place.task
    if adaptive and batch != before:
        seen = None
    part = evaluate(
        model,
        task.search,
        task.preprocess,
        batch=batch,
        device=task.device,
        dtype=DTYPES[task.dtype],
        head_indices=task.head_indices,
        start=0 if seen is None else len(seen.top1),
        stop=stop,
    )
    return part if seen is None else seen.then(part)


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
        self.place = Worker.open(task)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.asked = new_config
        self.climbing: Iterator[Rung | TrialResult] | None = None
        return True

    def step(self) -> dict[str, Any]:
        """One rung. The result is on disk before Ray, and so anybody, hears of it."""
        trial, study = int(self.asked["trial"]), self.place.task.study
        recipe = Recipe.from_dict(self.asked["recipe"])
        if self.climbing is None:
            self.climbing = climb(self.place, trial, recipe)
        try:
            result = next(self.climbing)
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
        if isinstance(result, Rung):
            return {"done": False, "top1": result.values["top1"], RUNG: result}
        if result.reason != OUTSIDE:
            study.write(result, self.place.task.epoch)
        # its result is durable: nothing has to go on from where its training stood
        delete_tree(study.training(str(self.asked["key"])))
        return {
            "done": True,
            "trial_number": trial,
            "outside": result.reason == OUTSIDE,
            "violation": outside_by(result, self.place.task),
            "top1": result.values.get("top1", 0.0),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep: the result file is the state."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing was kept."""
