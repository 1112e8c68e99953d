"""Studies that are raced without a model: bits and costs go in, what was stopped comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from vitpareto.search.stats.pareto import non_dominated
from vitpareto.search.stats.racing import Incumbent, Race, Rule, rungs


@dataclass(frozen=True)
class Raced:
    """One study: images seen by all trials, of so many; looks; and which front points it lost."""

    images: int
    whole: int
    looks: int
    stopped: tuple[int, ...]
    lost: tuple[int, ...]


def front_of(right: np.ndarray, costs: np.ndarray) -> list[int]:
    """Return the true front on all images of right [N, M] and costs [N, K]."""
    points = np.column_stack([right.sum(axis=1), costs])
    return list(np.flatnonzero(non_dominated(points, [-1] + [1] * costs.shape[1])))


def lost_of(right: np.ndarray, costs: np.ndarray, stopped: Sequence[int]) -> tuple[int, ...]:
    """Return the front members that no fully measured trial covers."""
    measured = np.setdiff1d(np.arange(len(right)), stopped)
    count = right.sum(axis=1)
    return tuple(
        int(f)
        for f in front_of(right, costs)
        if not ((count[measured] >= count[f]) & (costs[measured] <= costs[f]).all(axis=1)).any()
    )


def race_study(
    right: np.ndarray,
    costs: np.ndarray,
    rule: Rule,
    error: float = 0.05,
    looked: Sequence[int] | None = None,
    spend: bool = True,
) -> Raced:
    """Race candidates, right [N, M] at costs [N, K], in this order; the first is the dense model.

    spend: False gives every trial and every look the whole error, which is wrong.
    """
    many, images = right.shape
    looked = rungs(images) if looked is None else looked
    race = Race(images, error, many, rule, looks=max(1, len(looked) - 1))
    if not spend:
        race = _WithoutErrorBudget(images, error, many, rule, looks=1)
    race.error_of(0)
    incumbents = [Incumbent(0, right[0], tuple(costs[0]))]
    seen, looks, stopped = images, 0, []
    for trial in range(1, many):
        decision, stop = None, 0
        for stop in looked:
            if stop < images:
                looks += 1
                decision = race.check(
                    trial, right[trial, :stop], costs[trial], incumbents, right[0]
                )
            if decision is not None:
                stopped.append(trial)
                race.mark_dominated(trial)
                break
        seen += stop
        if decision is None:
            new = Incumbent(trial, right[trial], tuple(costs[trial]))
            if any(old.covers(new) for old in incumbents):
                race.mark_dominated(trial)
            else:
                incumbents = [old for old in incumbents if not new.covers(old)] + [new]
    return Raced(seen, many * images, looks, tuple(stopped), lost_of(right, costs, stopped))


class _WithoutErrorBudget(Race):
    def error_of(self, trial: int) -> float:
        return self.error


def simulated(
    draw: np.random.Generator, many: int, images: int, objectives: int, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return correctness [N, M] and costs [N, K] of a simulated study.

    The difficulty of an image is shared by all candidates, so that a paired difference has about a
    quarter of the variance of an unpaired one. Accuracies increase with the cost by `spread`, with
    random deviations of a third of it. The order of the images is random.
    """
    costs = draw.uniform(0.2, 1.0, (many, objectives - 1))
    costs[0] = 1.0
    skill = 0.75 + spread * (costs.mean(axis=1) + draw.normal(0, 0.3, many))
    hard = draw.normal(size=images)
    noise = draw.normal(size=(many, images))
    level = norm.ppf(np.clip(skill, 0.02, 0.98))
    right = np.sqrt(0.8) * hard + np.sqrt(0.2) * noise < level[:, None]
    return right, costs
