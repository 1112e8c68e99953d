"""The axes of the front's picture, and its caption, which accounts for every trial.

Draws nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import ACCURACIES, Objective
from vitpareto.search.study.results import TrialResult

#: An accuracy lower than the dense model's by more points than this is drawn as an arrow on the
#: lower edge: one trial at 3 % would otherwise compress all relevant differences into a few pixels.
ARROW_DROP = 30.0


@dataclass(frozen=True)
class PublishedPoint:
    """A result from a paper: `values` by objective name, in the objectives' units."""

    method: str
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FrontView:
    """The two objectives of the picture.

    `floor` is the accuracy at the lower edge; None if all accuracies are drawn at their value.
    """

    vertical: Objective
    horizontal: Objective
    floor: float | None

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        return self.vertical, self.horizontal

    def is_below(self, values: Mapping[str, float]) -> bool:
        """Whether a trial is an arrow on the lower edge."""
        return self.floor is not None and values[self.vertical.name] < self.floor

    def position(self, values: Mapping[str, float]) -> tuple[float, float]:
        """(x, y) in data coordinates; on the lower edge if the accuracy is below it."""
        y = values[self.vertical.name]
        return values[self.horizontal.name], y if self.floor is None else max(y, self.floor)

    def text(self, values: Mapping[str, float]) -> str:
        """Both values with their units."""
        return ", ".join(f"{values[o.name]:.4g} {o.unit}" for o in self.objectives)

    def front(self, results: Sequence[TrialResult]) -> list[TrialResult]:
        """The front of these results, in order of increasing cost."""
        sign, name = self.horizontal.sign, self.horizontal.name
        return sorted(front_of(results, self.objectives), key=lambda r: sign * r.values[name])

    def interval(self, result: TrialResult) -> tuple[float, float] | None:
        """The 95 % interval on the search images; None if it is not drawn."""
        low, high = result.top1_low, result.top1_high
        if not self._has_intervals(result) or low is None or high is None:
            return None
        return low, high

    def certified_interval(self, result: TrialResult) -> tuple[float, float] | None:
        """The simultaneous interval on the held-out images; None if it is not drawn."""
        certified = result.certified
        if certified is None or not self._has_intervals(result):
            return None
        return certified.low, certified.high

    def _has_intervals(self, result: TrialResult) -> bool:
        return self.vertical.name == "top1" and not self.is_below(result.values)


def has_values(values: Mapping[str, float], objectives: Sequence[Objective]) -> bool:
    """Whether all objectives were measured and are finite."""
    return all(np.isfinite(values.get(o.name, np.nan)) for o in objectives)


def accuracy_floor(
    drawn: Sequence[TrialResult],
    published: Sequence[PublishedPoint],
    vertical: Objective,
    dense: TrialResult | None,
) -> float | None:
    """The accuracy below which trials become arrows; None if no trial, or most trials, would."""
    if vertical.name not in ACCURACIES or dense is None:
        return None
    limit = min(
        dense.values[vertical.name] - ARROW_DROP, *(p.values[vertical.name] for p in published),
        float("inf"),
    )  # fmt: skip
    below = sum(r.values[vertical.name] < limit for r in drawn)
    return limit if 0 < below <= len(drawn) / 2 else None


def trials_text(count: int) -> str:
    return f"{count} trial" if count == 1 else f"{count} trials"


def caption(
    results: Sequence[TrialResult],
    drawn: Sequence[TrialResult],
    members: Sequence[TrialResult],
    dense: TrialResult | None,
    view: FrontView,
) -> str:
    """How many trials are drawn, hidden or on the edge, and why the others are not drawn.

    Args:
        results: all results.
        drawn: those that have a mark.
        members: members of the front.
        dense: the dense model's result.
        view: the axes.
    """
    states = Counter(r.state for r in drawn)
    parts = [f"{trials_text(states['finished'])} fully measured"]
    if states["raced_out"]:
        parts.append(f"{states['raced_out']} stopped early")
    if missing := _missing(results, drawn, view):
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(missing.items()))
        parts.append(f"not drawn: {counts}")
    sentences = ["; ".join(parts)]
    below = [r.values[view.vertical.name] for r in drawn if view.is_below(r.values)]
    if below:
        sentences.append(
            f"Arrows on the lower edge: {trials_text(len(below))} below {view.floor:.4g} %, "
            f"down to {min(below):.3g} %"
        )
    hidden = len(drawn) - len({tuple(r.values[o.name] for o in view.objectives) for r in drawn})
    if hidden:
        sentences.append(f"{trials_text(hidden)} hidden by identical ones")
    if not members:
        sentences.append("No front yet")
    elif members == [dense]:
        sentences.append(
            "No front yet: no pruned model is fully measured"
            if states["finished"] == 1
            else "No front: no trial costs less or is more accurate than the dense model"
        )
    return ". ".join(sentences) + "."


def _missing(
    results: Sequence[TrialResult], drawn: Sequence[TrialResult], view: FrontView
) -> Counter[str]:
    """How many trials have no mark, by reason."""
    drawn_ids = {id(r) for r in drawn}
    missing: Counter[str] = Counter()
    for r in results:
        if r.state in ("failed", "running"):
            missing[r.state] += 1
        elif id(r) not in drawn_ids:
            name = next(o.name for o in view.objectives if not has_values(r.values, (o,)))
            missing[f"without {name}"] += 1
    return missing
