"""The front against closed forms, a brute-force second implementation and Optuna's as a third."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from vitpareto.search.study.front import (
    Front,
    FrontChange,
    NothingUnderBudget,
    choose,
    front_of,
    hypervolume,
    knee,
    knee_of,
    non_dominated,
    objectives_named,
    rank,
    reference_point,
)
from vitpareto.search.study.results import OBJECTIVES, TrialResult, TrialState

TOP1_GMACS = objectives_named(("top1", "gmacs"))
#: Hypervolumes are sums and differences of up to a few hundred products: rounding, nothing else.
ROUNDING = 1e-9


def trial(
    number: int,
    top1: float,
    gmacs: float,
    state: TrialState = "finished",
    method: str = "tome",
    **more: float,
) -> TrialResult:
    recipe = {} if method == "dense" else {"tokens": {"method": method, "r": number}}
    values = {"top1": top1, "gmacs": gmacs, **more}
    return TrialResult(number, state, recipe, key=f"key{number}", values=values)


# ------------------------------------------------------------------- the second implementation


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


def slow_non_dominated(losses: np.ndarray) -> list[bool]:
    """By the definition, pair by pair."""
    return [
        not any(dominates(q, p) for q in losses) and not any((q == p).all() for q in losses[:i])
        for i, p in enumerate(losses)
    ]


def slow_rank(losses: np.ndarray) -> list[int]:
    """Peel one front after another."""
    ranks = np.full(len(losses), -1)
    for level in range(len(losses)):
        left = np.flatnonzero(ranks < 0)
        for i in left:
            if not any(dominates(losses[j], losses[i]) for j in left):
                ranks[i] = level
    return ranks.tolist()


def grid_hypervolume(losses: np.ndarray, reference: Sequence[int]) -> int:
    """Count the unit cells of an integer grid that some point dominates."""
    if len(losses) == 0:
        return 0
    low = losses.min(axis=0).astype(int)
    cells = itertools.product(*(range(a, r) for a, r in zip(low, reference, strict=True)))
    return sum(any((p <= cell).all() for p in losses) for cell in map(np.array, cells))


def inclusion_exclusion(losses: np.ndarray, reference: np.ndarray) -> float:
    """Sum over all subsets of the volume of their boxes' intersection, with alternating sign."""
    gains = np.maximum(reference - losses, 0.0)
    total = 0.0
    for size in range(1, len(gains) + 1):
        for subset in itertools.combinations(gains, size):
            total -= (-1) ** size * float(np.prod(np.min(subset, axis=0)))
    return total


@st.composite
def integer_points(draw, most: int = 14, objectives: tuple[int, int] = (1, 4)):
    """Small integers, so that ties and duplicates are common; with random directions."""
    k = draw(st.integers(*objectives))
    rows = draw(st.lists(st.tuples(*[st.integers(-2, 4)] * k), max_size=most))
    signs = draw(st.tuples(*[st.sampled_from((-1, 1))] * k))
    return np.array(rows, dtype=float).reshape(-1, k), signs


# ---------------------------------------------------------------------------------- dominance


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([[1, 1]], [True]),
        ([[80, 4], [70, 2]], [True, True]),
        ([[80, 4], [80, 4]], [True, False]),  # of duplicates the first
        ([[80, 4], [80, 3]], [False, True]),  # a tie in accuracy: the cheaper
        ([[79, 3], [80, 3]], [False, True]),  # a tie in cost: the more accurate
        ([[70, 4], [80, 2], [60, 1]], [False, True, True]),
    ],
)
def test_non_dominated_of_accuracy_and_cost(points, expected):
    assert non_dominated(points, (-1, 1)).tolist() == expected


@given(integer_points())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_dominance_and_ranks_equal_the_definition(case):
    points, signs = case
    losses = points * signs
    assert non_dominated(points, signs).tolist() == slow_non_dominated(losses)
    assert rank(points, signs).tolist() == slow_rank(losses)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_dominance_and_ranks_on_real_numbers(k):
    points = np.random.default_rng(k).normal(size=(120, k))
    assert non_dominated(points, [1] * k).tolist() == slow_non_dominated(points)
    assert rank(points, [1] * k).tolist() == slow_rank(points)


def test_signed_zeros_are_one_number():
    assert non_dominated([[0.0, -0.0], [-0.0, 0.0]], (1, -1)).tolist() == [True, False]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("shape", ["all on the front", "a chain", "random"])
def test_five_thousand_points(k, shape):
    """Sizes at which a quadratic loop in Python would not come back within the suite's limit."""
    m = 5000
    x = np.arange(m, dtype=float)
    if shape == "random":
        points = np.random.default_rng(0).normal(size=(m, k))
        ranks = rank(points, [1] * k)
        assert (non_dominated(points, [1] * k) == (ranks == 0)).all()
        assert set(ranks) == set(range(ranks.max() + 1))
    elif shape == "a chain":
        points = np.stack([x] * k, axis=1)
        assert non_dominated(points, [1] * k).sum() == 1
        assert rank(points, [1] * k).tolist() == list(range(m))
    else:
        points = np.stack([x, -x] + [x % 7] * (k - 2), axis=1)
        assert non_dominated(points, [1] * k).all()
        assert (rank(points, [1] * k) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_coordinate_is_refused_by_name(bad):
    points = [[1.0, 2.0], [3.0, bad]]
    for refused in (
        lambda: non_dominated(points, (1, 1)),
        lambda: rank(points, (1, 1)),
        lambda: hypervolume(points, (5, 5), (1, 1)),
    ):
        with pytest.raises(ValueError, match=r"point 1 has a non-finite coordinate: \[3.0, "):
            refused()
    with pytest.raises(ValueError, match="reference point 0 has a non-finite"):
        hypervolume([[1.0, 2.0]], (bad, 1.0), (1, 1))


@pytest.mark.parametrize(
    ("points", "signs", "message"),
    [
        ([[1, 2]], (1,), r"shape \[M, 1\].*got \(1, 2\)"),
        ([1, 2], (1, 1), r"got \(2,\)"),
        ([[1, 2]], (1, 0), r"\+1 and -1, got \[1, 0\]"),
        ([[1, 2]], (), r"\+1 and -1, got \[\]"),
    ],
)
def test_shapes_and_signs_are_checked(points, signs, message):
    with pytest.raises(ValueError, match=message):
        non_dominated(points, signs)


# -------------------------------------------------------------------------------- hypervolume


@pytest.mark.parametrize(
    ("points", "reference", "signs", "expected"),
    [
        ([], (1, 1), (1, 1), 0),
        ([[3]], (5,), (1,), 2),
        ([[80, 2]], (70, 5), (-1, 1), 10 * 3),
        ([[80, 2], [80, 2]], (70, 5), (-1, 1), 10 * 3),
        ([[80, 4], [75, 1]], (70, 5), (-1, 1), 5 * 1 + 5 * 4),
        ([[80, 5]], (70, 5), (-1, 1), 0),  # no better than the reference in cost
        ([[69, 1]], (70, 5), (-1, 1), 0),
        ([[80, 2], [99, 6], [60, 0]], (70, 5), (-1, 1), 10 * 3),  # clipped by the reference
        ([[80, 2, 10]], (70, 5, 14), (-1, 1, 1), 10 * 3 * 4),
        ([[80, 2, 9], [71, 4, 20]], (70, 5, 4), (-1, 1, -1), 10 * 3 * 5 + 1 * 1 * 11),
        ([[1, 1, 1, 1], [0, 2, 2, 2]], (3, 3, 3, 3), (1, 1, 1, 1), 16 + 3 - 2),
    ],
)
def test_hypervolume_closed_forms(points, reference, signs, expected):
    assert hypervolume(points, reference, signs) == pytest.approx(expected, rel=ROUNDING)


@given(integer_points(most=9))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_hypervolume_equals_the_cells_counted(case):
    points, signs = case
    reference = np.full(points.shape[1], 3)  # below the largest coordinate: some are clipped
    counted = grid_hypervolume(points, reference.tolist())
    assert hypervolume(points * signs, reference * signs, signs) == pytest.approx(counted)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_hypervolume_equals_inclusion_exclusion(k):
    points = np.random.default_rng(k).normal(size=(9, k))
    expected = inclusion_exclusion(points, np.ones(k))
    assert hypervolume(points, np.ones(k), [1] * k) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(("k", "m"), [(2, 2000), (3, 500), (4, 60), (5, 25)])
@pytest.mark.parametrize("kind", ["random", "front"])
def test_hypervolume_equals_optuna(k, m, kind):
    points = np.random.default_rng(m).random((m, k)) + 0.05
    if kind == "front":  # on a sphere around the origin's opposite corner: all non-dominated
        points = 1.2 - points / np.linalg.norm(points, axis=1, keepdims=True)
    reference = np.full(k, 1.0)
    below = points[(points < reference).all(axis=1)]
    expected = compute_hypervolume(below, reference)
    assert hypervolume(points, reference, [1] * k) == pytest.approx(expected, rel=ROUNDING)


@given(integer_points(most=8, objectives=(2, 3)), st.integers(0, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_further_point_never_loses_volume_and_order_does_not_matter(case, last):
    points, signs = case
    reference = np.full(points.shape[1], 4) * signs
    whole = hypervolume(points, reference, signs)
    assert hypervolume(points[:last], reference, signs) <= whole + ROUNDING
    assert hypervolume(points[::-1], reference, signs) == pytest.approx(whole)
    assert hypervolume(points[non_dominated(points, signs)], reference, signs) == pytest.approx(
        whole
    )


def test_reference_point_is_ten_points_under_dense_at_its_cost():
    objectives = objectives_named(("top1", "gmacs", "top5", "images_per_s"))
    dense = {"top1": 79.8, "top5": 95.0, "gmacs": 4.608, "images_per_s": 900.0, "peak_mb": 1.0}
    reference = reference_point(dense, objectives)
    assert reference == pytest.approx([69.8, 4.608, 85.0, 900.0])
    values = [[dense[o.name] for o in objectives]]
    assert hypervolume(values, reference, [o.sign for o in objectives]) == 0.0
    with pytest.raises(ValueError, match="the dense model has no 'gmacs'; it has: top1"):
        reference_point({"top1": 80.0}, TOP1_GMACS)
    with pytest.raises(ValueError, match="top1 = nan"):
        reference_point({"top1": float("nan"), "gmacs": 1.0}, TOP1_GMACS)


# -------------------------------------------------------------------------------------- Front


def test_front_says_who_entered_and_who_left():
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


def test_completing_a_trial_twice_changes_nothing_but_another_result_is_refused():
    front = Front(TOP1_GMACS, reference=(70.0, 5.0))
    front.add(1, {"top1": 78.0, "gmacs": 4.0})
    assert front.add(1, {"top1": 78.0, "gmacs": 4.0}) == FrontChange(False, ())
    with pytest.raises(ValueError, match=r"trial 1 was added with \(78.0, 4.0\), now with \(79.0"):
        front.add(1, {"top1": 79.0, "gmacs": 4.0})
    with pytest.raises(ValueError, match="trial 2 has no 'gmacs'; it has: top1"):
        front.add(2, {"top1": 79.0})
    with pytest.raises(ValueError, match="trial 2 has top1 = nan"):
        front.add(2, {"top1": float("nan"), "gmacs": 1.0})
    assert len(front) == 1


def test_front_refuses_a_reference_of_another_length():
    with pytest.raises(ValueError, match=r"reference points of shape \[M, 2\]"):
        Front(TOP1_GMACS, reference=(70.0, 5.0, 1.0))


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), max_size=25), st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_incremental_front_equals_the_batch(rows, three):
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


def test_front_of_takes_finished_trials_only_and_sorts_by_gmacs():
    results = [
        trial(0, 80.0, 5.0, method="dense"),
        trial(1, 99.0, 1.0, state="raced_out"),
        trial(2, 70.0, 2.0),
        trial(3, 78.0, 3.0, method="random"),
        trial(4, 77.0, 3.5),
        TrialResult(5, "failed", {}, key="k", reason="out of memory"),
    ]
    assert [r.trial for r in front_of(results, TOP1_GMACS)] == [2, 3, 0]
    assert front_of([], TOP1_GMACS) == []
    with pytest.raises(ValueError, match="trial 2 has no 'latency_ms'; it has: top1, gmacs"):
        front_of(results[2:3], objectives_named(("top1", "latency_ms")))


def test_objectives_are_looked_up_with_a_hint():
    assert objectives_named(["gmacs"]) == (OBJECTIVES["gmacs"],)
    with pytest.raises(ValueError, match="'gmac': did you mean 'gmacs'"):
        objectives_named(("top1", "gmac"))
    with pytest.raises(ValueError, match="named once, got top1, top1"):
        objectives_named(("top1", "top1"))


# --------------------------------------------------------------------------------------- knee


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([[80, 4]], 0),
        ([[80, 4], [70, 2]], 1),  # two: the cheaper
        ([[80, 4], [80, 4], [80, 4]], 0),
        ([[70, 1], [79, 2], [80, 5]], 1),
        ([[80, 5], [79, 2], [70, 1]], 1),
        ([[60, 1], [70, 2], [80, 3]], 0),  # a straight line: the cheapest
        ([[60, 1], [62, 3], [80, 4]], 0),  # a dent is no knee
        ([[0, 0], [6, 1], [8.5, 3], [10, 10]], 2),  # scaled distances .50 and .55
        ([[0, 0], [6, 1], [8.0, 3], [10, 10]], 1),  # both at .50: the cheaper
    ],
)
def test_knee_is_the_farthest_from_the_chord(members, expected):
    assert knee(members) == expected


def test_knee_does_not_depend_on_units_and_ignores_further_objectives():
    members = np.array([[70, 1, 5], [79, 2, 9], [80, 5, 1]], dtype=float)
    assert knee(members, (-1, 1, -1)) == knee(members * [0.01, 1e9, 1.0]) == 1
    throughput = members * [1, -1, 1] + [0, 10, 0]  # the same shape, more being better
    assert knee(throughput, (-1, -1)) == 1


@pytest.mark.parametrize(("members", "got"), [([], r"\(0,\)"), ([[1.0], [2.0]], r"\(2, 1\)")])
def test_knee_needs_a_member_and_two_axes(members, got):
    with pytest.raises(ValueError, match=f"got shape {got}"):
        knee(members)
    with pytest.raises(ValueError, match="member 0 has a non-finite"):
        knee([[np.nan, 1.0]])


# ------------------------------------------------------------------------------------- choose

CANDIDATES = [
    trial(0, 80.0, 4.6, method="dense", latency_ms=10.0),
    trial(1, 78.0, 3.0, latency_ms=8.0),
    trial(2, 78.0, 2.9, latency_ms=9.0),
    trial(3, 70.0, 2.0),
    trial(4, 99.0, 0.1, state="raced_out", latency_ms=0.1),
]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"max_gmacs": 3.5}, 2),  # a tie in accuracy: the lower cost
        ({"max_gmacs": 2.9}, 2),  # bounds are inclusive
        ({"max_gmacs": 100}, 0),
        ({"max_latency_ms": 9.0}, 1),  # the tie is broken by latency, the only budget
        ({"max_latency_ms": 9.0, "max_gmacs": 4}, 2),
        ({"max_latency_ms": 8.5, "max_gmacs": 3.5}, 1),
        ({"min_top1": 78.0}, 2),
        ({"min_top1": 60}, 3),
        ({"min_top1": 78.0, "max_latency_ms": 9.5}, 1),
        ({"min_top1": 75, "max_gmacs": 4, "max_latency_ms": 8}, 1),
    ],
)
def test_choose(budget, expected):
    assert choose(CANDIDATES, **budget).trial == expected
    assert choose(CANDIDATES[::-1], **budget).trial == expected


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"max_gmacs": 1.5},
            (
                r"none of 4 finished trials has gmacs <= 1.5 G; "
                r"nearest: trial 3 \(tome\): top1 70 %, gmacs 2 G; trial 2"
            ),
        ),
        ({"min_top1": 81}, r"top1 >= 81 %; nearest: trial 0 \(dense\): top1 80 %, gmacs 4.6 G"),
        (
            {"max_latency_ms": 1, "min_top1": 50},
            (
                r"latency_ms <= 1 ms and top1 >= 50 %; nearest: trial 1 \(tome\): .*"
                r"latency_ms 8 ms.*; 1 have no latency_ms"
            ),
        ),
    ],
)
def test_nothing_under_budget_names_the_budget_and_the_nearest(budget, message):
    with pytest.raises(NothingUnderBudget, match=message) as caught:
        choose(CANDIDATES, **budget)
    assert isinstance(caught.value, LookupError)


def test_choose_refuses_what_it_cannot_judge():
    with pytest.raises(NothingUnderBudget, match="none of 0 finished trials has gmacs <= 1 G$"):
        choose([], max_gmacs=1)
    with pytest.raises(ValueError, match="needs one of max_gmacs, max_latency_ms, min_top1"):
        choose(CANDIDATES)
    with pytest.raises(ValueError, match="budget for gmacs must be finite, got nan"):
        choose(CANDIDATES, max_gmacs=float("nan"))
    with pytest.raises(ValueError, match="trial 7 has no 'gmacs'"):
        choose([TrialResult(7, "finished", {}, "k", {"top1": 1.0})], max_gmacs=1)


def _trial(number: int, top1: float, gmacs: float) -> TrialResult:
    recipe = {"tokens": {"method": "topk"}} if number else {}
    return TrialResult(number, "finished", recipe, str(number), {"top1": top1, "gmacs": gmacs})


def test_the_knee_ignores_members_below_the_reference() -> None:
    axes = objectives_named(("top1", "gmacs"))
    dense = _trial(0, 90.0, 10.0)
    useful = [_trial(2, 81.0, 4.0), _trial(3, 88.0, 5.0), _trial(4, 90.0, 9.0)]
    useless = _trial(1, 10.0, 3.9)
    assert knee_of(useful, axes, dense) is useful[1]
    # with the useless member the chord is so steep that the cheapest useful one looks like a knee
    assert knee_of([useless, *useful], axes, None) is useful[0]
    assert knee_of([useless, *useful], axes, dense) is useful[1]


def test_a_front_without_an_interior_knee_has_none() -> None:
    axes = objectives_named(("top1", "gmacs"))
    dense = _trial(0, 90.0, 10.0)
    line = [_trial(i, 80.0 + i, float(i)) for i in range(1, 6)]
    assert knee_of(line, axes, dense) is None
    assert knee_of(line[:2], axes, dense) is None
    assert knee_of([], axes, dense) is None
