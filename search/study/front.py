"""The front and what is read off it: dominance, ranks, hypervolume, knee, choice under a budget.

Pure arithmetic on numpy arrays and on `TrialResult`s. It may not measure, read or write anything,
and it knows no study: the caller says which trials exist and which were fully measured.

Throughout, `points` is float [M, K] in the objectives' own units and `signs` has K entries, +1
where less is better and -1 where more is better (`Objective.sign`), so that `signs * points` is
minimised. Non-finite coordinates raise ValueError: a NaN compares false with everything and would
otherwise sit on every front.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitpareto.search.study.results import OBJECTIVES, Objective, TrialResult

Floats = NDArray[np.float64]

#: Which objectives are accuracies, best first; every other objective is a cost.
ACCURACIES = ("top1", "top5")
#: How far below the dense accuracy the hypervolume's reference point lies (DESIGN, data flow).
REFERENCE_DROP = 10.0


class NothingUnderBudget(LookupError):
    """No finished trial meets the budget; the message names the budget and the nearest trials."""


def objectives_named(names: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives of these names, in this order; ValueError on an unknown or repeated name."""
    for name in names:
        if name not in OBJECTIVES:
            near = difflib.get_close_matches(name, OBJECTIVES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown objective {name!r}: {hint}accepted: {', '.join(OBJECTIVES)}")
    if len(set(names)) != len(names):
        raise ValueError(f"each objective may be named once, got {', '.join(names)}")
    return tuple(OBJECTIVES[name] for name in names)


# ---------------------------------------------------------------------------------- dominance


def _losses(points: ArrayLike, signs: Sequence[int], what: str = "point") -> Floats:
    """`signs * points` as float64 [M, K], checked; an empty list is [0, K]."""
    factors = np.asarray(signs, dtype=np.float64)
    if factors.ndim != 1 or factors.size == 0 or not np.isin(factors, (-1.0, 1.0)).all():
        raise ValueError(f"signs must be one or more of +1 and -1, got {list(signs)}")
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0 and array.ndim <= 2:
        array = array.reshape(0, factors.size)
    if array.ndim != 2 or array.shape[1] != factors.size:
        raise ValueError(
            f"expected {what}s of shape [M, {factors.size}], one column a sign, got {array.shape}"
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"{what} {first} has a non-finite coordinate: {array[first].tolist()}; "
            "every coordinate must be finite"
        )
    return array * factors + 0.0  # + 0.0 turns -0.0 into 0.0, so that ties are bitwise ties


class _Staircase:
    """Points already swept, for K <= 3: only the last two coordinates can still decide.

    Rows arrive in lexicographic order, so an earlier row is no worse in the coordinates before
    the last two. Kept are the minima in those two: `y` ascending, `z` descending.
    """

    def __init__(self) -> None:
        self.y: list[float] = []
        self.z: list[float] = []

    def covers(self, row: Floats) -> bool:
        at = bisect_right(self.y, row[-2]) - 1
        return at >= 0 and self.z[at] <= row[-1]

    def add(self, row: Floats) -> None:
        start = stop = bisect_left(self.y, row[-2])
        while stop < len(self.z) and self.z[stop] >= row[-1]:
            stop += 1
        self.y[start:stop] = [row[-2]]
        self.z[start:stop] = [row[-1]]


class _Rows:
    """Points already swept, for K >= 4: compared with all of them."""

    def __init__(self) -> None:
        self.rows: list[Floats] = []

    def covers(self, row: Floats) -> bool:
        return bool(self.rows) and bool((np.stack(self.rows) <= row).all(axis=1).any())

    def add(self, row: Floats) -> None:
        self.rows.append(row)


def _swept(unique: Floats, deepest: int | None) -> NDArray[np.int64]:
    """Rank int [M] of distinct rows in lexicographic order; ranks beyond `deepest` read as it.

    Efficient non-dominated sort with binary search (ENS-BS, Zhang et al., IEEE TEC 19(2), 2015):
    a row dominated from layer f is dominated from every layer before f, so bisection finds its
    layer. With staircase layers O(M log M) for K = 2 and O(M log M log F) for K = 3, apart from
    list insertion; O(M * M) at worst for K >= 4.
    """
    make = _Staircase if unique.shape[1] <= 3 else _Rows
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
            layers.append(make())
        layers[low].add(row)
    return ranks


def non_dominated(points: ArrayLike, signs: Sequence[int]) -> NDArray[np.bool_]:
    """Which points no other dominates: bool [M] for `points` [M, K].

    A point is dominated if another is no worse in every coordinate and better in one. Of exact
    duplicates only the first is kept. Non-finite coordinates raise ValueError naming the point.
    O(M log M) for K = 2 and 3.
    """
    losses = _losses(points, signs)
    kept = np.zeros(len(losses), dtype=bool)
    unique, first = np.unique(losses, axis=0, return_index=True)
    kept[first[_swept(unique, deepest=1) == 0]] = True
    return kept


def rank(points: ArrayLike, signs: Sequence[int]) -> NDArray[np.int64]:
    """Non-domination rank int [M]: 0 on the front, 1 on the front of the rest, and so on.

    Exact duplicates share a rank (nothing tells them apart), whereas `non_dominated` keeps the
    first. Non-finite coordinates raise ValueError naming the point.
    """
    losses = _losses(points, signs)
    unique, where = np.unique(losses, axis=0, return_inverse=True)
    return _swept(unique, deepest=None)[where.reshape(-1)]


# -------------------------------------------------------------------------------- hypervolume


def hypervolume(points: ArrayLike, reference: ArrayLike, signs: Sequence[int]) -> float:
    """The exact volume dominated by `points` [M, K] and bounded by `reference` [K]; any K.

    In the product of the objectives' units. A point that is not strictly better than the
    reference in every coordinate adds nothing; of the others only the part on the good side of
    the reference counts. No points: 0.0. Non-finite coordinates raise ValueError.

    K <= 2 is a sweep. K >= 3 slices along the last coordinate and sums each point's exclusive
    volume over the points limited by it (WFG: While, Bradstreet and Barone, "A Fast Way of
    Calculating Exact Hypervolumes", IEEE TEC 16(1), 2012): O(M^2 log M) for K = 3.
    """
    bound = _losses([np.asarray(reference, dtype=np.float64)], signs, "reference point")[0]
    gains = bound - _losses(points, signs)
    gains = gains[(gains > 0).all(axis=1)]
    return float(_union(gains[_first_layer(gains)]))


def _first_layer(gains: Floats) -> NDArray[np.int64]:
    """Indices of the distinct, non-dominated rows of `gains` [M, K], larger being better."""
    unique, first = np.unique(-gains, axis=0, return_index=True)
    return first[_swept(unique, deepest=1) == 0]


def _union(gains: Floats) -> float:
    """Volume of the union of the boxes [0, g] over the rows g > 0 of `gains` [M, K]."""
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
    for i, own in enumerate(gains):
        shared = np.minimum(gains[i + 1 :, :-1], own[:-1])
        if shared.shape[1] > 2:  # the two-dimensional sweep needs no filter
            shared = shared[_first_layer(shared)]
        total += own[-1] * (np.prod(own[:-1]) - _union(shared))
    return float(total)


def reference_point(dense_values: Mapping[str, float], objectives: Sequence[Objective]) -> Floats:
    """The hypervolume's reference [K] from the dense model's values, by objective name.

    Dense accuracy minus 10 points for accuracies (also where that is below zero: the volume stays
    comparable within a study), the dense value for costs; so the dense model itself, and whatever
    costs as much, adds no volume. ValueError if a value is missing or not finite.
    """
    dense = _row(dense_values, objectives, "the dense model")
    drop = [REFERENCE_DROP if o.name in ACCURACIES else 0.0 for o in objectives]
    return np.asarray(dense) - np.asarray(drop)


# ------------------------------------------------------------------------- trials on the front


def _row(values: Mapping[str, float], objectives: Sequence[Objective], who: str) -> list[float]:
    """The objectives' values in order; ValueError naming `who` if one is missing or not finite."""
    for objective in objectives:
        if objective.name not in values:
            raise ValueError(
                f"{who} has no {objective.name!r}; it has: {', '.join(values) or 'no values'}"
            )
        if not math.isfinite(values[objective.name]):
            raise ValueError(
                f"{who} has {objective.name} = {values[objective.name]}; it must be finite"
            )
    return [float(values[objective.name]) for objective in objectives]


def _axes(objectives: Sequence[Objective]) -> tuple[int, int]:
    """Which objectives are the (accuracy, primary cost): the first of each kind named.

    Without an accuracy, or without a cost, the first objective stands in for what is missing.
    """
    accuracy = [i for i, o in enumerate(objectives) if o.name in ACCURACIES]
    cost = [i for i, o in enumerate(objectives) if o.name not in ACCURACIES]
    return (accuracy or [0])[0], (cost or [0])[0]


@dataclass(frozen=True)
class FrontMember:
    """A trial on the front; `values` in the order of the front's objectives."""

    trial: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class FrontChange:
    """What adding a trial did: whether it entered, and which trials it pushed off."""

    entered: bool
    left: tuple[int, ...] = ()


class Front:
    """The front of a running study, one trial at a time.

    It holds what `non_dominated` would keep of all trials added so far, in the order added (of
    duplicates the first). It cannot tell an estimate from a measurement: adding only fully
    measured trials (state "finished") is the caller's duty.
    """

    def __init__(self, objectives: Sequence[Objective], reference: ArrayLike) -> None:
        """`reference` [K], in the objectives' units (`reference_point`); bad ones: ValueError."""
        self.objectives = tuple(objectives)
        self.signs = tuple(o.sign for o in self.objectives)
        self.reference = np.asarray(reference, dtype=np.float64)
        _losses([self.reference], self.signs, "reference point")
        self._members: list[FrontMember] = []
        self._losses = np.empty((0, len(self.signs)))
        self._seen: dict[int, tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def add(self, trial_id: int, values: Mapping[str, float]) -> FrontChange:
        """Add a trial by its values, by objective name (others are ignored).

        The same trial with the same values again changes nothing (Ray may complete a trial
        twice); with other values it is a ValueError, as is a missing or non-finite value.
        """
        row = tuple(_row(values, self.objectives, f"trial {trial_id}"))
        if trial_id in self._seen:
            if self._seen[trial_id] != row:
                raise ValueError(
                    f"trial {trial_id} was added with {self._seen[trial_id]}, now with {row}; "
                    "a trial has one result"
                )
            return FrontChange(entered=False)
        self._seen[trial_id] = row
        new = _losses([row], self.signs)
        if (self._losses <= new).all(axis=1).any():
            return FrontChange(entered=False)
        beaten = np.flatnonzero((new <= self._losses).all(axis=1))
        left = tuple(self._members[i].trial for i in beaten)
        self._members = [m for m in self._members if m.trial not in left]
        self._members.append(FrontMember(trial_id, row))
        self._losses = np.vstack([np.delete(self._losses, beaten, axis=0), new])
        return FrontChange(entered=True, left=left)

    def members(self) -> tuple[FrontMember, ...]:
        """The front, cheapest first: by the first objective that is a cost, ties by trial."""
        cost = _axes(self.objectives)[1]
        sign = self.signs[cost]
        return tuple(sorted(self._members, key=lambda m: (sign * m.values[cost], m.trial)))

    def hypervolume(self) -> float:
        """The volume between the front and the reference point, as the function `hypervolume`."""
        return hypervolume([m.values for m in self._members], self.reference, self.signs)

    def progress(self) -> float:
        """The hypervolume over accuracy and primary cost alone: what a search is watched by.

        Token methods leave parameters at the dense model's, which is the reference: over all three
        axes the volume would stay 0 whatever is found.
        """
        axes = list(_axes(self.objectives))
        points = [[m.values[i] for i in axes] for m in self._members]
        return hypervolume(points, self.reference[axes], [self.signs[i] for i in axes])


def front_of(results: Iterable[TrialResult], objectives: Sequence[Objective]) -> list[TrialResult]:
    """The non-dominated results among those in state "finished", cheapest first (by gmacs).

    Controls and the dense model count as any other. Of results with equal objectives the first
    given is kept. ValueError if a finished result lacks an objective or gmacs, or one is not
    finite; other states are not looked at.
    """
    finished = [r for r in results if r.state == "finished"]
    gmacs = [_row(r.values, (OBJECTIVES["gmacs"],), f"trial {r.trial}")[0] for r in finished]
    points = [_row(r.values, objectives, f"trial {r.trial}") for r in finished]
    kept = np.flatnonzero(non_dominated(points, [o.sign for o in objectives]))
    return [finished[i] for i in sorted(kept, key=lambda i: (gmacs[i], finished[i].trial))]


def knee(members: ArrayLike, signs: Sequence[int] = (-1, 1)) -> int:
    """Index of the member farthest from the chord between the extremes, on the side of the ideal.

    `members` is [M, K], M >= 1, accuracy first and primary cost second; further columns are not
    looked at. Both axes are scaled to [0, 1]; the chord joins the cheapest member to the most
    accurate one. A member on the far side of the chord is a dent, not a knee. Where no member
    lies on the good side (one, two, or a straight line of them) the cheapest extreme is returned.
    No members, fewer than two columns or signs, or a non-finite value: ValueError.
    """
    array = np.asarray(members, dtype=np.float64)
    if array.ndim != 2 or len(array) == 0 or array.shape[1] < 2 or len(signs) < 2:
        raise ValueError(
            f"a knee needs members [M >= 1, K >= 2] and two signs, got shape {array.shape} "
            f"and signs {list(signs)}"
        )
    losses = _losses(array[:, :2], signs[:2], "member")
    low, span = losses.min(axis=0), np.ptp(losses, axis=0)
    scaled = (losses - low) / np.where(span > 0, span, 1.0)
    cheapest = int(np.lexsort((scaled[:, 0], scaled[:, 1]))[0])
    accurate = int(np.lexsort((scaled[:, 1], scaled[:, 0]))[0])
    # Twice the triangle's area; the chord's length is common to all, so it cannot change the order.
    down, across = scaled[accurate] - scaled[cheapest]
    from_cheapest = scaled - scaled[cheapest]
    towards_ideal = from_cheapest[:, 1] * down - from_cheapest[:, 0] * across
    best = float(towards_ideal.max())
    if best <= 1e-12:  # on the chord, to the rounding of values scaled to one
        return cheapest
    tied = np.flatnonzero(towards_ideal >= best - 1e-12)
    return int(tied[np.argmin(scaled[tied, 1])])


def reference_of(results: Iterable[TrialResult]) -> TrialResult | None:
    """The dense model's result, if it is there."""
    return next((r for r in results if r.is_reference and r.state == "finished"), None)


def knee_of(
    front: Sequence[TrialResult], objectives: Sequence[Objective], dense: TrialResult | None
) -> TrialResult | None:
    """The front's knee, or None where it has none (an end of the front is no knee).

    Looked for among members within the reference's drop from `dense` (`reference_point`): a
    useless but very cheap member would otherwise pull the chord, and the knee with it.
    """
    axes = [objectives[i] for i in _axes(objectives)]
    useful = list(front)
    if dense is not None:
        floor = reference_point(dense.values, axes)[0]
        useful = [r for r in front if axes[0].sign * (r.values[axes[0].name] - floor) < 0]
    if len(useful) < 3:
        return None
    points = [[r.values[o.name] for o in axes] for r in useful]
    at = knee(points, [o.sign for o in axes])
    return useful[at] if 0 < at < len(useful) - 1 else None


# --------------------------------------------------------------------------------- the choice


def choose(
    results: Iterable[TrialResult],
    *,
    max_gmacs: float | None = None,
    max_latency_ms: float | None = None,
    min_top1: float | None = None,
) -> TrialResult:
    """The finished trial to deploy under a budget: gmacs in G, latency in ms, top-1 in percent.

    Without `min_top1`: the best top-1 within the budgets, ties to the lower cost. With it: the
    cheapest that reaches it (within the budgets, where given), ties to the better top-1. Cost is
    gmacs, or the latency where that is the only budget. All bounds are inclusive; last ties go
    to the lower trial. A trial whose latency was not measured is not within any latency budget.

    Where any trial is certified, `min_top1` is held against the lower end of the certified
    interval, and no other trial is taken for it: those of all certified ones hold at once, so that
    the one chosen keeps its promise. Otherwise against top-1 on the search images, which flatters.

    Errors: ValueError with no budget at all, a non-finite one, or a finished trial without top1
    or gmacs; `NothingUnderBudget` if none qualifies.
    """
    bounds = {"gmacs": max_gmacs, "latency_ms": max_latency_ms, "top1": min_top1}
    limits = {name: float(limit) for name, limit in bounds.items() if limit is not None}
    if not limits:
        raise ValueError("choose needs one of max_gmacs, max_latency_ms, min_top1; got none")
    for name, limit in limits.items():
        if not math.isfinite(limit):
            raise ValueError(f"the budget for {name} must be finite, got {limit}")
    cost = "latency_ms" if max_latency_ms is not None and max_gmacs is None else "gmacs"

    finished = [r for r in results if r.state == "finished"]
    for result in finished:
        _row(result.values, objectives_named(("top1", "gmacs")), f"trial {result.trial}")
    certified = min_top1 is not None and any(r.certified is not None for r in finished)

    def held(result: TrialResult, name: str) -> float:
        """What a bound on `name` is held against; NaN where that was not measured."""
        if name == "top1" and certified:
            return math.nan if result.certified is None else result.certified.low
        return result.values.get(name, math.nan)

    judged = [r for r in finished if all(math.isfinite(held(r, n)) for n in limits)]

    def shortfall(result: TrialResult) -> float:
        """How far outside the budget, each bound relative to itself; 0 within."""
        return sum(
            max(0.0, OBJECTIVES[n].sign * (held(result, n) - limit)) / (abs(limit) or 1.0)
            for n, limit in limits.items()
        )

    within = [r for r in judged if shortfall(r) == 0]
    if within and min_top1 is not None:
        return min(within, key=lambda r: (r.values[cost], -r.values["top1"], r.trial))
    if within:
        return min(within, key=lambda r: (-r.values["top1"], r.values[cost], r.trial))

    def shown(name: str, value: float) -> str:
        return f"{value:.4g} {OBJECTIVES[name].unit}"

    asked = " and ".join(
        f"{'certified top1' if certified and n == 'top1' else n} "
        f"{'<=' if OBJECTIVES[n].sign > 0 else '>='} {limit:g} {OBJECTIVES[n].unit}"
        for n, limit in limits.items()
    )
    columns = [n for n in ("top1", "gmacs", "latency_ms") if n in limits or n != "latency_ms"]

    def described(result: TrialResult) -> str:
        said = [f"{n} {shown(n, result.values[n])}" for n in columns]
        if certified and result.certified is not None:
            own = result.certified
            said[0] = (
                f"certified top1 at least {shown('top1', own.low)} "
                f"({shown('top1', own.top1)} of {own.images} held-out images)"
            )
        return f"trial {result.trial} ({result.method}): " + ", ".join(said)

    nearest = "; ".join(map(described, sorted(judged, key=lambda r: (shortfall(r), r.trial))[:3]))
    message = f"none of {len(finished)} finished trials has {asked}"
    message += f"; nearest: {nearest}" if nearest else ""
    lacking = {
        "are not certified": [r for r in finished if certified and r.certified is None],
        "have no latency_ms": [
            r
            for r in finished
            if "latency_ms" in limits and not math.isfinite(held(r, "latency_ms"))
        ],
    }
    message += "".join(f"; {len(some)} {what}" for what, some in lacking.items() if some)
    raise NothingUnderBudget(message)
