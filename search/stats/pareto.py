"""Pareto arithmetic on arrays: dominance, ranks, hypervolume and knee.

In all functions `points` is float [M, K], in the objectives' own units, and `signs` has K entries:
+1 if less is better, -1 if more is better, so that `signs * points` is minimized. Non-finite
coordinates raise `BadInput`, because a NaN compares false with everything and would be on every
front. May not know trials or studies.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitpareto.search.errors import BadInput, Code

Floats = NDArray[np.float64]

#: Distance from the chord below which a member is on it, in units of the scaled axes.
ON_CHORD = 1e-12


def losses_of(points: ArrayLike, signs: Sequence[int], what: str = "point") -> Floats:
    """Return `signs * points` as float64 [M, K]; an empty list gives [0, K].

    Args:
        points: [M, K].
        signs: K entries of +1 or -1.
        what: name of a row in messages.

    Raises:
        BadInput: the signs, the shape or a coordinate are invalid.
    """
    factors = np.asarray(signs, dtype=np.float64)
    if factors.ndim != 1 or factors.size == 0 or not np.isin(factors, (-1.0, 1.0)).all():
        raise BadInput(
            f"signs must be one or more of +1 and -1 (got {list(signs)})",
            Code.OUT_OF_RANGE, name="signs", got=list(signs),
        )  # fmt: skip
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0 and array.ndim <= 2:
        array = array.reshape(0, factors.size)
    if array.ndim != 2 or array.shape[1] != factors.size:
        raise BadInput(
            f"{what}s must have shape [M, {factors.size}], one column per sign (got {array.shape})",
            Code.WRONG_TYPE, name=what, got=array.shape,
        )  # fmt: skip
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise BadInput(
            f"coordinates must be finite (got {what} {first}: {array[first].tolist()})",
            Code.OUT_OF_RANGE, name=what, index=first, got=array[first].tolist(),
        )  # fmt: skip
    return array * factors + 0.0  # + 0.0 turns -0.0 into 0.0, so that equal losses are identical


class _Staircase:
    """A layer for K <= 3, where only the last two coordinates can still decide.

    Rows arrive in lexicographic order, so an earlier row is no worse in the coordinates before
    the last two. Holds the minima in those two: `y` ascending, `z` descending.
    """

    def __init__(self) -> None:
        self.y: list[float] = []
        self.z: list[float] = []

    def covers(self, row: Floats) -> bool:
        """Return whether a row of the layer is no worse than `row` in every coordinate."""
        at = bisect_right(self.y, row[-2]) - 1
        return at >= 0 and self.z[at] <= row[-1]

    def add(self, row: Floats) -> None:
        start = stop = bisect_left(self.y, row[-2])
        while stop < len(self.z) and self.z[stop] >= row[-1]:
            stop += 1
        self.y[start:stop] = [row[-2]]
        self.z[start:stop] = [row[-1]]


class _Rows:
    """A layer for K >= 4: a row is compared with all rows of the layer."""

    def __init__(self) -> None:
        self.rows: list[Floats] = []

    def covers(self, row: Floats) -> bool:
        """Return whether a row of the layer is no worse than `row` in every coordinate."""
        return bool(self.rows) and bool((np.stack(self.rows) <= row).all(axis=1).any())

    def add(self, row: Floats) -> None:
        self.rows.append(row)


def _ranks_of_sorted(unique: Floats, deepest: int | None) -> NDArray[np.int64]:
    """Return the rank, int [M], of distinct rows in lexicographic order.

    Ranks beyond `deepest` are reported as `deepest`.

    Efficient non-dominated sort with binary search (ENS-BS, Zhang et al., IEEE TEC 19(2), 2015):
    a row that is dominated from layer f is dominated from every layer before f, so bisection finds
    its layer. With staircase layers O(M log M) for K = 2 and O(M log M log F) for K = 3, apart from
    list insertion; O(M * M) at worst for K >= 4.
    """
    layer = _Staircase if unique.shape[1] <= 3 else _Rows
    if unique.shape[1] == 1:
        unique = np.hstack([np.zeros_like(unique), unique])
    layers: list[_Staircase | _Rows] = []
    ranks = np.empty(len(unique), dtype=np.int64)
    for i, row in enumerate(unique):
        low, high = 0, len(layers)
        while low < high:
            middle = (low + high) // 2
            if layers[middle].covers(row):
                low = middle + 1
            else:
                high = middle
        ranks[i] = low
        if low == deepest:
            continue
        if low == len(layers):
            layers.append(layer())
        layers[low].add(row)
    return ranks


def non_dominated(points: ArrayLike, signs: Sequence[int]) -> NDArray[np.bool_]:
    """Return which points are not dominated by another: bool [M] for `points` [M, K].

    A point is dominated if another is no worse in every coordinate and better in one. Of exact
    duplicates only the first is returned. O(M log M) for K = 2 and 3.
    """
    losses = losses_of(points, signs)
    on_front = np.zeros(len(losses), dtype=bool)
    unique, first = np.unique(losses, axis=0, return_index=True)
    on_front[first[_ranks_of_sorted(unique, deepest=1) == 0]] = True
    return on_front


def rank(points: ArrayLike, signs: Sequence[int]) -> NDArray[np.int64]:
    """Return the non-domination rank, int [M]: 0 on the front, 1 on the front of the rest, etc.

    Exact duplicates share a rank, whereas `non_dominated` returns only the first of them.
    """
    losses = losses_of(points, signs)
    unique, where = np.unique(losses, axis=0, return_inverse=True)
    return _ranks_of_sorted(unique, deepest=None)[where.reshape(-1)]


def hypervolume(points: ArrayLike, reference: ArrayLike, signs: Sequence[int]) -> float:
    """Return the exact volume that `points` [M, K] dominate, bounded by `reference` [K]; any K.

    In the product of the objectives' units. A point adds volume only if it is strictly better than
    the reference in every coordinate. 0.0 for no points.

    K <= 2 is a sweep. K >= 3 slices along the last coordinate and sums each point's exclusive
    volume over the points limited by it (WFG: While, Bradstreet and Barone, "A Fast Way of
    Calculating Exact Hypervolumes", IEEE TEC 16(1), 2012): O(M^2 log M) for K = 3.
    """
    bound = losses_of([np.asarray(reference, dtype=np.float64)], signs, "reference point")[0]
    gains = bound - losses_of(points, signs)
    gains = gains[(gains > 0).all(axis=1)]
    return float(_union(gains[_first_layer(gains)]))


def _first_layer(gains: Floats) -> NDArray[np.int64]:
    """Return the indices of the distinct, non-dominated rows of `gains` [M, K]; more is better."""
    unique, first = np.unique(-gains, axis=0, return_index=True)
    return first[_ranks_of_sorted(unique, deepest=1) == 0]


def _union(gains: Floats) -> float:
    """Return the volume of the union of the boxes [0, g] over the rows g > 0 of `gains` [M, K]."""
    if len(gains) == 0:
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    if gains.shape[1] == 2:
        wide = gains[np.argsort(-gains[:, 0], kind="stable")]
        heights = np.maximum.accumulate(wide[:, 1])
        return float(wide[:, 0] @ np.diff(heights, prepend=0.0))
    # Ascending in the last coordinate: a point limits all later ones to its own last coordinate,
    # so what it shares with them is one slice of constant thickness, one dimension lower.
    gains = gains[np.argsort(gains[:, -1], kind="stable")]
    total = 0.0
    for i, gain in enumerate(gains):
        shared = np.minimum(gains[i + 1 :, :-1], gain[:-1])
        if shared.shape[1] > 2:  # the two-dimensional sweep needs no filter
            shared = shared[_first_layer(shared)]
        total += gain[-1] * (np.prod(gain[:-1]) - _union(shared))
    return float(total)


def knee(members: ArrayLike, signs: Sequence[int] = (-1, 1)) -> int:
    """Return the index of the member farthest from the chord of the front, on the ideal's side.

    Both axes are scaled to [0, 1]; the chord joins the cheapest member to the most accurate one.
    Returns the cheapest member if none lies on the ideal's side of the chord.

    Args:
        members: [M, K], M >= 1, accuracy first and primary cost second; further columns are
            ignored.
        signs: two or more signs.

    Raises:
        BadInput: no members, fewer than two columns or signs, or a non-finite value.
    """
    array = np.asarray(members, dtype=np.float64)
    if array.ndim != 2 or len(array) == 0 or array.shape[1] < 2 or len(signs) < 2:
        raise BadInput(
            f"a knee needs members of shape [M >= 1, K >= 2] and two signs (got shape "
            f"{array.shape} and signs {list(signs)})",
            Code.WRONG_TYPE, name="members", got=array.shape,
        )  # fmt: skip
    losses = losses_of(array[:, :2], signs[:2], "member")
    low, span = losses.min(axis=0), np.ptp(losses, axis=0)
    scaled = (losses - low) / np.where(span > 0, span, 1.0)
    cheapest = int(np.lexsort((scaled[:, 0], scaled[:, 1]))[0])
    accurate = int(np.lexsort((scaled[:, 1], scaled[:, 0]))[0])
    # twice the triangle's area: the chord's length is common to all and cannot change the order
    down, across = scaled[accurate] - scaled[cheapest]
    from_cheapest = scaled - scaled[cheapest]
    towards_ideal = from_cheapest[:, 1] * down - from_cheapest[:, 0] * across
    best = float(towards_ideal.max())
    if best <= ON_CHORD:
        return cheapest
    tied = np.flatnonzero(towards_ideal >= best - ON_CHORD)
    return int(tied[np.argmin(scaled[tied, 1])])
