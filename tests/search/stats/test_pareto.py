"""Pareto arithmetic against closed forms, a brute-force implementation and Optuna's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.stats.pareto import hypervolume, knee, non_dominated, rank

#: Hypervolumes are sums and differences of up to a few hundred products: rounding, nothing else.
ROUNDING = 1e-9


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


def test_signed_zeros_are_equal():
    assert non_dominated([[0.0, -0.0], [-0.0, 0.0]], (1, -1)).tolist() == [True, False]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("shape", ["all on the front", "a chain", "random"])
def test_five_thousand_points(k, shape):
    """A quadratic loop in Python exceeds the time limit at this size."""
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
def test_non_finite_coordinate_is_refused(bad):
    points = [[1.0, 2.0], [3.0, bad]]
    for call in (
        lambda: non_dominated(points, (1, 1)),
        lambda: rank(points, (1, 1)),
        lambda: hypervolume(points, (5, 5), (1, 1)),
    ):
        with refused(Code.OUT_OF_RANGE, name="point", index=1):
            call()
    with refused(Code.OUT_OF_RANGE, name="reference point", index=0):
        hypervolume([[1.0, 2.0]], (bad, 1.0), (1, 1))


@pytest.mark.parametrize(
    ("points", "signs", "code", "got"),
    [
        ([[1, 2]], (1,), Code.WRONG_TYPE, (1, 2)),
        ([1, 2], (1, 1), Code.WRONG_TYPE, (2,)),
        ([[1, 2]], (1, 0), Code.OUT_OF_RANGE, [1, 0]),
        ([[1, 2]], (), Code.OUT_OF_RANGE, []),
    ],
)
def test_shapes_and_signs_are_checked(points, signs, code, got):
    with refused(code, got=got):
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
def test_hypervolume_equals_the_number_of_dominated_cells(case):
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
def test_hypervolume_is_monotonic_and_independent_of_the_order(case, last):
    points, signs = case
    reference = np.full(points.shape[1], 4) * signs
    whole = hypervolume(points, reference, signs)
    assert hypervolume(points[:last], reference, signs) <= whole + ROUNDING
    assert hypervolume(points[::-1], reference, signs) == pytest.approx(whole)
    assert hypervolume(points[non_dominated(points, signs)], reference, signs) == pytest.approx(
        whole
    )


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


@pytest.mark.parametrize("members", [[], [[1.0], [2.0]]])
def test_knee_needs_a_member_and_two_axes(members):
    with refused(Code.WRONG_TYPE, name="members"):
        knee(members)
    with refused(Code.OUT_OF_RANGE, name="member", index=0):
        knee([[np.nan, 1.0]])
