"""Rungs of a trial: prefixes of the whole measurement, and no image twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitpareto.methods import Recipe
from vitpareto.search.data.decoded import Split
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.results import TrialResult, unpack_bits
from vitpareto.search.study.rungs import RungReport
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe, run_rungs
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

IMAGES, BATCH = 90, 16
TOPK = Recipe.of("topk", keep_rate=0.5)
ATS = Recipe.from_yaml("tokens: {method: ats, prune_layers: [3, 6], max_tokens: 40}")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Worker:
    store = tmp_path_factory.mktemp("store")
    config = SearchConfig.of({"images": IMAGES, "batch": BATCH, "store": str(store),
                              "cache": str(cache), "device": "cpu"})  # fmt: skip
    return Worker.open(study_task(check_job(config), threads=None))


def at(worker: Worker, *rungs: int, **changed) -> Worker:
    return replace(worker, task=replace(worker.task, rungs=rungs, **changed))


@pytest.mark.parametrize("recipe", [TOPK, ATS], ids=str)
def test_each_rung_is_a_prefix_of_the_full_measurement(worker: Worker, recipe: Recipe) -> None:
    whole = measure_recipe(worker, 1, recipe)
    right = unpack_bits(whole.bits, whole.images)
    *reports, last = run_rungs(at(worker, 16, 40, 90), 1, recipe)
    assert [type(r) for r in reports] == [RungReport, RungReport]
    for rung in reports:
        assert isinstance(rung, RungReport)
        assert (rung.right == right[: len(rung.right)]).all()
        assert rung.values["top1"] == 100 * rung.right.mean()
        assert rung.key == whole.key and rung.resolved == whole.resolved
    # costs and correctness do not depend on where it paused
    same = replace(last, seconds=whole.seconds, ended_ms=whole.ended_ms)  # type: ignore[type-var]
    for name in ("gmacs", "gmacs_mean"):
        if name in whole.values:
            assert same.values[name] == pytest.approx(whole.values[name], rel=1e-12)
    assert replace(same, values=whole.values) == whole


def test_rungs_of_adaptive_recipes_end_at_batches(worker: Worker) -> None:
    """ATS pads a batch to its longest image: a rung inside a batch would change its cost."""
    *reports, _ = run_rungs(at(worker, 10, 40), 1, ATS)
    assert [len(r.right) for r in reports if isinstance(r, RungReport)] == [16, 48]
    rung = reports[0]
    assert isinstance(rung, RungReport) and rung.macs_each is not None and len(rung.macs_each) == 16
    low, high = rung.bounds
    assert (low <= rung.macs_each).all() and (rung.macs_each <= high).all()
    assert rung.values["gmacs_mean"] == pytest.approx(rung.macs_each.mean() / 1e9)
    *plain, _ = run_rungs(at(worker, 10, 40), 1, TOPK)
    assert [len(r.right) for r in plain if isinstance(r, RungReport)] == [10, 40]
    assert all(r.macs_each is None for r in plain if isinstance(r, RungReport))


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Which images of the split are read for forwards."""
    seen: list[tuple[int, int]] = []
    read = Split.batch

    def batch(self: Split, first: int, stop: int):
        seen.append((first, stop))
        return read(self, first, stop)

    monkeypatch.setattr(Split, "batch", batch)
    yield seen


def test_each_image_is_evaluated_once_and_none_after_a_stop(
    worker: Worker, evaluated: list[tuple[int, int]]
) -> None:
    steps = run_rungs(at(worker, 20, 50), 1, TOPK)
    next(steps)
    assert evaluated == [(0, 16), (16, 20)]
    steps.close()  # stopped here: nothing more is run, memory is not measured either
    assert evaluated == [(0, 16), (16, 20)]
    evaluated.clear()
    list(run_rungs(at(worker, 20, 50), 1, TOPK))
    forwards, memory = evaluated[:-1], evaluated[-1]
    assert [a for a, _ in forwards[1:]] == [b for _, b in forwards[:-1]]
    assert forwards[-1][1] == IMAGES and memory == (0, BATCH)


def test_peak_memory_is_measured_first_if_it_is_an_objective(worker: Worker) -> None:
    first = next(run_rungs(at(worker, 20, memory_first=True), 1, TOPK))
    assert isinstance(first, RungReport) and first.values["peak_mb"] > 0
    later = next(run_rungs(at(worker, 20), 1, TOPK))
    assert isinstance(later, RungReport) and "peak_mb" not in later.values


def test_rungs_beyond_the_last_image_are_ignored(worker: Worker) -> None:
    (only,) = run_rungs(at(worker, IMAGES, 500), 1, TOPK)
    assert isinstance(only, TrialResult) and only.images == IMAGES
    assert np.isfinite(only.values["top1"])
