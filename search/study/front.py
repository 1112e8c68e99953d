"""The front of a study: its members, hypervolume and knee.

Reads `TrialResult`s and uses the arithmetic of `search.stats.pareto`. It may not measure, read or
write anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vitpareto.search.errors import Code, UserError
from vitpareto.search.stats.pareto import Floats, hypervolume, knee, losses_of, non_dominated
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES, Objective, axes_of
from vitpareto.search.study.results import TrialResult

#: How far below the dense accuracy the hypervolume's reference point is, in points.
REFERENCE_DROP = 10.0


def values_of(
    values: Mapping[str, float], objectives: Sequence[Objective], owner: str
) -> list[float]:
    """Return the objectives' values in order.

    Args:
        values: by objective name; other names are ignored.
        objectives: which values, in which order.
        owner: whose values these are, for messages.

    Raises:
        UserError: a value is missing or not finite.
    """
    for objective in objectives:
        name = objective.name
        if name not in values:
            raise UserError(
                f"{owner} has no value for {name!r} (got: {', '.join(values) or 'no values'})",
                Code.MISSING, owner=owner, name=name,
            )  # fmt: skip
        if not math.isfinite(values[name]):
            raise UserError(
                f"{name} of {owner} must be finite (got {values[name]})",
                Code.OUT_OF_RANGE, owner=owner, name=name, got=values[name],
            )  # fmt: skip
    return [float(values[objective.name]) for objective in objectives]


def reference_point(dense_values: Mapping[str, float], objectives: Sequence[Objective]) -> Floats:
    """Return the hypervolume's reference point [K] for the dense model's values.

    Accuracies: the dense value minus `REFERENCE_DROP`, also where that is below zero, so that
    volumes stay comparable within a study. Costs: the dense value. The dense model, and candidates
    that cost as much, add no volume.
    """
    dense = values_of(dense_values, objectives, "the dense model")
    drop = [REFERENCE_DROP if o.name in ACCURACIES else 0.0 for o in objectives]
    return np.asarray(dense) - np.asarray(drop)


@dataclass(frozen=True)
class FrontMember:
    """A trial on the front; `values` are in the order of the front's objectives."""

    trial: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class FrontChange:
    """The effect of adding a trial: whether it entered, and the trials that left the front."""

    entered: bool
    left: tuple[int, ...] = ()


class Front:
    """The front of a running study, updated one trial at a time.

    Holds what `non_dominated` returns for all trials added so far, in the order added. The caller
    must add only fully measured trials (state "finished").
    """

    def __init__(self, objectives: Sequence[Objective], reference: ArrayLike) -> None:
        """reference: [K], in the objectives' units (see `reference_point`)."""
        self.objectives = tuple(objectives)
        self.signs = tuple(o.sign for o in self.objectives)
        self.reference = np.asarray(reference, dtype=np.float64)
        losses_of([self.reference], self.signs, "reference point")
        self._members: list[FrontMember] = []
        self._losses = np.empty((0, len(self.signs)))
        self._seen: dict[int, tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def add(self, trial: int, values: Mapping[str, float]) -> FrontChange:
        """Add a trial with its values by objective name.

        Adding a trial again with the same values has no effect, because Ray may complete a trial
        twice.

        Raises:
            UserError: the trial was added with other values, or a value is missing or not finite.
        """
        row = tuple(values_of(values, self.objectives, f"trial {trial}"))
        if trial in self._seen:
            if self._seen[trial] != row:
                raise UserError(
                    f"trial {trial} must have one result (got {self._seen[trial]}, then {row})",
                    Code.CONFLICT, trial=trial, got=row,
                )  # fmt: skip
            return FrontChange(entered=False)
        self._seen[trial] = row
        new = losses_of([row], self.signs)
        if (self._losses <= new).all(axis=1).any():
            return FrontChange(entered=False)
        dominated = np.flatnonzero((new <= self._losses).all(axis=1))
        left = tuple(self._members[i].trial for i in dominated)
        self._members = [m for m in self._members if m.trial not in left]
        self._members.append(FrontMember(trial, row))
        self._losses = np.vstack([np.delete(self._losses, dominated, axis=0), new])
        return FrontChange(entered=True, left=left)

    def members(self) -> tuple[FrontMember, ...]:
        """Return the front, cheapest first: by the primary cost, ties by trial number."""
        cost = axes_of(self.objectives)[1]
        sign = self.signs[cost]
        return tuple(sorted(self._members, key=lambda m: (sign * m.values[cost], m.trial)))

    def hypervolume(self) -> float:
        """Return the volume between the front and the reference point, over all objectives."""
        return hypervolume([m.values for m in self._members], self.reference, self.signs)

    def progress(self) -> float:
        """Return the hypervolume over accuracy and primary cost alone, to watch a search by.

        Token methods do not change the number of parameters: with `params_m` among the objectives
        they add no volume over all axes.
        """
        axes = list(axes_of(self.objectives))
        points = [[m.values[i] for i in axes] for m in self._members]
        return hypervolume(points, self.reference[axes], [self.signs[i] for i in axes])


def front_of(results: Iterable[TrialResult], objectives: Sequence[Objective]) -> list[TrialResult]:
    """Return the non-dominated results among those in state "finished", cheapest first (by gmacs).

    Controls and the dense model are included. Of results with equal objectives the first is
    returned.

    Raises:
        UserError: a finished result lacks an objective or gmacs, or one is not finite.
    """
    finished = [r for r in results if r.state == "finished"]
    gmacs = [values_of(r.values, (OBJECTIVES["gmacs"],), f"trial {r.trial}")[0] for r in finished]
    points = [values_of(r.values, objectives, f"trial {r.trial}") for r in finished]
    on_front = np.flatnonzero(non_dominated(points, [o.sign for o in objectives]))
    return [finished[i] for i in sorted(on_front, key=lambda i: (gmacs[i], finished[i].trial))]


def reference_of(results: Iterable[TrialResult]) -> TrialResult | None:
    """Return the dense model's result; None if it was not measured."""
    return next((r for r in results if r.is_reference and r.state == "finished"), None)


def knee_of(
    front: Sequence[TrialResult], objectives: Sequence[Objective], dense: TrialResult | None
) -> TrialResult | None:
    """Return the front's knee; None if it has none. An end of the front is not a knee.

    Only members above the accuracy of the reference point (`reference_point`) of `dense` are used:
    a very cheap member of useless accuracy would move the chord, and the knee with it.
    """
    axes = [objectives[i] for i in axes_of(objectives)]
    useful = list(front)
    if dense is not None:
        floor = reference_point(dense.values, axes)[0]
        useful = [r for r in front if axes[0].sign * (r.values[axes[0].name] - floor) < 0]
    if len(useful) < 3:
        return None
    points = [[r.values[o.name] for o in axes] for r in useful]
    at = knee(points, [o.sign for o in axes])
    return useful[at] if 0 < at < len(useful) - 1 else None
