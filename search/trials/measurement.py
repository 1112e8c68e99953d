"""One trial: build the recipe, measure it rung by rung, and make a result of it.

Whether a trial goes on to its next rung is decided elsewhere (`search.trials.early_stopping`); who
runs it and where its result is written is `search.trials.trial_actor`'s. Does not import ray.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import nn

from vitpareto.methods import Recipe
from vitpareto.search.measure.accuracy import Correctness, evaluate, largest_fitting_batch
from vitpareto.search.measure.latency import Latency
from vitpareto.search.measure.memory import peak_mb
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.rungs import RungReport
from vitpareto.search.trials.built_candidate import Candidate
from vitpareto.search.trials.task import TrialTask
from vitpareto.search.trials.worker import Worker


def run_rungs(worker: Worker, trial: int, recipe: Recipe) -> Iterator[RungReport | TrialResult]:
    """Build a recipe, look at its cost, and measure it: a report after each rung of the task but
    the last, then the result.

    Raises what building, training or running the recipe raises.
    """
    task, start = worker.task, time.monotonic()
    weighted = worker.with_weights(recipe)
    candidate = Candidate.of(worker.build(weighted.recipe), weighted.provenance, recipe)
    values = candidate.cost.values
    if "gmacs" in values and task.window.violation(values["gmacs"]) > 0 and not candidate.is_dense:
        yield candidate.outside(trial, values)
        return
    # calibration can resolve two settings to the same candidate, which is measured once
    known = task.study.folder.trials.by_key(candidate.key)
    if known is not None:
        yield candidate.copied(trial, known, time.monotonic() - start)
        return
    yield from _measure_rungs(worker, trial, candidate, task.rungs, start)


def measure_recipe(worker: Worker, trial: int, recipe: Recipe) -> TrialResult:
    """Measure a recipe on all search images; the task's rungs are not used to stop it."""
    *_, result = run_rungs(worker, trial, recipe)
    assert isinstance(result, TrialResult)
    return result


def measure_model(
    worker: Worker, trial: int, model: nn.Module, provenance: Provenance
) -> TrialResult:
    """Measure a built candidate on all search images; the result's recipe is the resolved one.

    provenance: what the result's has in addition, for example how it got its weights.
    """
    candidate = Candidate.of(model, provenance)
    *_, result = _measure_rungs(worker, trial, candidate, (), time.monotonic())
    assert isinstance(result, TrialResult)
    return result


def _measure_rungs(
    worker: Worker, trial: int, candidate: Candidate, rungs: tuple[int, ...], start: float
) -> Iterator[RungReport | TrialResult]:
    """Measure a candidate: a report after each of these numbers of search images, then the result.

    start: of the trial, by `time.monotonic`.
    Measured costs (latency, peak memory) come first if they are objectives, else last: a stopped
    trial does not pay for them.
    """
    task, total = worker.task, len(worker.task.images.search)
    if candidate.cost.adaptive:
        # padding is part of the cost: batches must be those of a trial without rungs
        batch = task.execution.batch
        rungs = tuple(-(-n // batch) * batch for n in rungs)
    measurement = _Measurement(worker, candidate, start)
    if task.latency.per_trial:
        measurement.measure_latency()
        if measurement.too_slow and not candidate.is_dense:
            yield candidate.outside(trial, measurement.values)
            return
    if task.memory_first:
        measurement.measure_memory()
    for stop in sorted({n for n in rungs if n < total}):
        measurement.evaluate_until(stop)
        yield measurement.report()
    measurement.evaluate_until(total)
    if not task.memory_first:
        measurement.measure_memory()
    yield measurement.result(trial)


class _Measurement:
    """A candidate's measurement as it grows. The batch is halved when memory does not suffice."""

    def __init__(self, worker: Worker, candidate: Candidate, start: float) -> None:
        self.worker, self.task, self.candidate, self.start = worker, worker.task, candidate, start
        self.batch = self.task.execution.batch
        self.values = candidate.cost.values
        self.correctness: Correctness | None = None
        self.latency: Latency | None = None

    def measure_latency(self) -> None:
        self.latency = self.worker.measure_latency(self.candidate.model)
        reference = self.task.study.folder.trials.get(0)
        milliseconds = drift_free_ms(self.latency, reference)
        self.values["latency_ms"] = milliseconds
        self.values["images_per_s"] = 1e3 * self.task.latency.batch / milliseconds

    @property
    def too_slow(self) -> bool:
        limit = self.task.latency.limit_ms
        return limit is not None and self.values["latency_ms"] > limit

    def measure_memory(self) -> None:
        total = len(self.task.images.search)

        def peak(batch: int) -> float:
            images = self.worker.search_batch(min(batch, total))
            return peak_mb(self.candidate.model, images)

        self.batch, self.values["peak_mb"] = largest_fitting_batch(self.batch, peak)

    def evaluate_until(self, stop: int) -> None:
        """Extend the measured images to the first `stop` of the search split."""
        before = self.batch
        self.batch, seen = largest_fitting_batch(
            before, lambda batch: self._evaluate(stop, batch, restart=batch != before)
        )
        self.correctness = seen
        if seen.macs is not None and seen.macs_mean is not None:
            self.values["gmacs"] = seen.macs / 1e9
            self.values["gmacs_mean"] = seen.macs_mean / 1e9
        self.values["top1"] = 100 * float(np.mean(seen.top1))
        self.values["top5"] = 100 * float(np.mean(seen.top5))

    def _evaluate(self, stop: int, batch: int, restart: bool) -> Correctness:
        seen, execution = self.correctness, self.task.execution
        if self.candidate.cost.adaptive and restart:
            seen = None  # padding is part of the cost: all batches must be of one size
        added = evaluate(
            self.candidate.model,
            self.task.images.search,
            self.task.images.preprocess,
            batch=batch,
            device=execution.device,
            dtype=execution.torch_dtype,
            head_indices=self.task.images.head_indices,
            start=0 if seen is None else len(seen.top1),
            stop=stop,
        )
        return added if seen is None else seen.then(added)

    @property
    def _provenance(self) -> Provenance:
        """How the candidate got its weights, and the batch if it was halved."""
        batch = None if self.batch == self.task.execution.batch else self.batch
        return self.candidate.provenance.updated(Provenance(batch=batch))

    def report(self) -> RungReport:
        assert self.correctness is not None
        cost = self.candidate.cost
        return RungReport(
            key=self.candidate.key,
            resolved=self.candidate.resolved,
            values=dict(self.values),
            right=self.correctness.top1,
            macs_each=self.correctness.macs_each,
            bounds=cost.macs if cost.adaptive else (0.0, 0.0),
            # the driver writes a stopped trial's result, and may run on another device
            provenance=replace(self._provenance, device=self.task.provenance.device),
            seconds=time.monotonic() - self.start,
        )

    def result(self, trial: int) -> TrialResult:
        assert self.correctness is not None
        right = self.correctness.top1
        low, high = wilson_interval(int(right.sum()), len(right))
        return TrialResult(
            trial=trial,
            state="finished",
            recipe=self.candidate.proposed,
            key=self.candidate.key,
            values=self.values,
            resolved=self.candidate.resolved,
            images=len(right),
            bits=pack_bits(right),
            top1_low=low,
            top1_high=high,
            seconds=time.monotonic() - self.start,
            provenance=self.task.provenance.updated(self._provenance),
            latency=self.latency,
        )


def drift_free_ms(timed: Latency, reference: TrialResult | None) -> float:
    """Milliseconds per batch as an objective: the reference's dense p50 over this trial's speed-up.

    A trial's own p50 depends on the machine's load at that time; candidate and dense were timed in
    turn, so their ratio does not. Trial 0 has no reference: its own p50.
    """
    base = None if reference is None else reference.latency
    return timed.p50_ms if base is None else base.p50_ms / timed.speedup


def limit_violation(result: TrialResult, task: TrialTask) -> float:
    """How far a measured candidate lies outside the study's limits; <= 0 inside.

    In GMACs; if its MACs are inside, the fraction of the latency limit by which it is slower.
    """
    macs = task.window.violation(result.values["gmacs"]) if "gmacs" in result.values else 0.0
    if macs > 0 or task.latency.limit_ms is None:
        return macs
    return result.values.get("latency_ms", 0.0) / task.latency.limit_ms - 1
