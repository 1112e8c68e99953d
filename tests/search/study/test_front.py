"""Members, changes and hypervolume of a study's front, and its knee."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.stats.pareto import hypervolume, non_dominated
from vitpareto.search.study.front import Front, FrontChange, front_of, knee_of, reference_point
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import TrialResult, TrialState

TOP1_GMACS = objectives_named(("top1", "gmacs"))


def trial(
    number: int,
    top1: float,
    gmacs: float,
    state: TrialState = "finished",
    method: str = "tome",
    **more: float,
) -> TrialResult:
    tokens = None if method == "dense" else RecordedStep(method, {"r": number})
    recipe = RecordedRecipe(tokens=tokens)
    values = {"top1": top1, "gmacs": gmacs, **more}
    return TrialResult(number, state, recipe, key=f"key{number}", values=values)


def test_reference_point_is_ten_points_below_dense_at_its_cost():
    objectives = objectives_named(("top1", "gmacs", "top5", "images_per_s"))
    dense = {"top1": 79.8, "top5": 95.0, "gmacs": 4.608, "images_per_s": 900.0, "peak_mb": 1.0}
    reference = reference_point(dense, objectives)
    assert reference == pytest.approx([69.8, 4.608, 85.0, 900.0])
    values = [[dense[o.name] for o in objectives]]
    assert hypervolume(values, reference, [o.sign for o in objectives]) == 0.0
    with refused(Code.MISSING, owner="the dense model", name="gmacs"):
        reference_point({"top1": 80.0}, TOP1_GMACS)
    with refused(Code.OUT_OF_RANGE, owner="the dense model", name="top1"):
        reference_point({"top1": float("nan"), "gmacs": 1.0}, TOP1_GMACS)


# -------------------------------------------------------------------------------------- Front


def test_front_reports_entered_and_left_trials():
    front = Front(TOP1_GMACS, reference=(70.0, 5.0))
    assert front.members() == () and front.hypervolume() == 0.0
    assert front.add(0, {"top1": 80.0, "gmacs": 5.0}) == FrontChange(True, ())
    assert front.add(1, {"top1": 78.0, "gmacs": 4.0}) == FrontChange(True, ())
    assert front.add(2, {"top1": 75.0, "gmacs": 3.5, "peak_mb": 1.0}) == FrontChange(True, ())
    assert front.add(3, {"top1": 75.0, "gmacs": 3.6}) == FrontChange(False, ())
    assert front.add(4, {"top1": 75.0, "gmacs": 3.5}) == FrontChange(False, ())  # a duplicate
    assert [m.trial for m in front.members()] == [2, 1, 0]
    assert front.add(5, {"top1": 79.0, "gmacs": 3.0}) == FrontChange(True, (1, 2))
    assert [(m.trial, m.values) for m in front.members()] == [(5, (79.0, 3.0)), (0, (80.0, 5.0))]
    assert front.hypervolume() == pytest.approx(9.0 * 2.0)
    assert len(front) == 2


def test_adding_a_trial_again_has_no_effect_and_another_result_is_refused():
    front = Front(TOP1_GMACS, reference=(70.0, 5.0))
    front.add(1, {"top1": 78.0, "gmacs": 4.0})
    assert front.add(1, {"top1": 78.0, "gmacs": 4.0}) == FrontChange(False, ())
    with refused(Code.CONFLICT, trial=1, got=(79.0, 4.0)):
        front.add(1, {"top1": 79.0, "gmacs": 4.0})
    with refused(Code.MISSING, owner="trial 2", name="gmacs"):
        front.add(2, {"top1": 79.0})
    with refused(Code.OUT_OF_RANGE, owner="trial 2", name="top1"):
        front.add(2, {"top1": float("nan"), "gmacs": 1.0})
    assert len(front) == 1


def test_front_refuses_a_reference_of_another_length():
    with refused(Code.WRONG_TYPE, name="reference point", got=(1, 3)):
        Front(TOP1_GMACS, reference=(70.0, 5.0, 1.0))


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=25), st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_incremental_front_equals_non_dominated(rows, three):
    objectives = objectives_named(("top1", "gmacs", "images_per_s") if three else ("top1", "gmacs"))
    signs = [o.sign for o in objectives]
    points = np.array(rows, dtype=float).reshape(-1, 3)[:, : len(signs)]
    reference = np.where(np.array(signs) > 0, 5.0, 1.0)
    front = Front(objectives, reference)
    on: set[int] = set()
    for i, row in enumerate(points):
        change = front.add(i, dict(zip([o.name for o in objectives], row, strict=True)))
        on = (on | {i} if change.entered else on) - set(change.left)
        assert on == set(np.flatnonzero(non_dominated(points[: i + 1], signs)))
    assert {m.trial for m in front.members()} == on
    costs = [m.values[1] for m in front.members()]
    assert costs == sorted(costs)
    assert front.hypervolume() == pytest.approx(hypervolume(points, reference, signs))


def test_a_front_of_accuracy_and_throughput_starts_with_the_fastest():
    front = Front(objectives_named(("top1", "images_per_s")), reference=(70.0, 100.0))
    front.add(0, {"top1": 80.0, "images_per_s": 100.0})
    front.add(1, {"top1": 75.0, "images_per_s": 300.0})
    assert [m.trial for m in front.members()] == [1, 0]


# ----------------------------------------------------------------------------------- front_of


def test_front_of_uses_finished_trials_only_and_sorts_by_gmacs():
    results = [
        trial(0, 80.0, 5.0, method="dense"),
        trial(1, 99.0, 1.0, state="raced_out"),
        trial(2, 70.0, 2.0),
        trial(3, 78.0, 3.0, method="random"),
        trial(4, 77.0, 3.5),
        TrialResult(5, "failed", RecordedRecipe(), key="k", reason="out of memory"),
    ]
    assert [r.trial for r in front_of(results, TOP1_GMACS)] == [2, 3, 0]
    assert front_of([], TOP1_GMACS) == []
    with refused(Code.MISSING, owner="trial 2", name="latency_ms"):
        front_of(results[2:3], objectives_named(("top1", "latency_ms")))


def result(number: int, top1: float, gmacs: float) -> TrialResult:
    recipe = RecordedRecipe(tokens=RecordedStep("topk", {}) if number else None)
    return TrialResult(number, "finished", recipe, str(number), {"top1": top1, "gmacs": gmacs})


def test_the_knee_ignores_members_below_the_reference() -> None:
    axes = objectives_named(("top1", "gmacs"))
    dense = result(0, 90.0, 10.0)
    useful = [result(2, 81.0, 4.0), result(3, 88.0, 5.0), result(4, 90.0, 9.0)]
    useless = result(1, 10.0, 3.9)
    assert knee_of(useful, axes, dense) is useful[1]
    # with the useless member the chord is so steep that the cheapest useful one looks like a knee
    assert knee_of([useless, *useful], axes, None) is useful[0]
    assert knee_of([useless, *useful], axes, dense) is useful[1]


def test_a_front_without_an_interior_knee_has_none() -> None:
    axes = objectives_named(("top1", "gmacs"))
    dense = result(0, 90.0, 10.0)
    line = [result(i, 80.0 + i, float(i)) for i in range(1, 6)]
    assert knee_of(line, axes, dense) is None
    assert knee_of(line[:2], axes, dense) is None
    assert knee_of([], axes, dense) is None
