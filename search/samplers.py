"""How the next candidate is proposed: Optuna's samplers, and one that starts from the front.

Optuna keeps the trials; nothing here knows what a recipe is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

#: how many of a hundred proposals start from the front, once there is one
NEAR = 50
#: how far a number moves, as a part of its range: drawn between these, evenly on a log scale
STEPS = (0.1, 0.5)
#: how many of a hundred choices among words are drawn anew
OTHER_WORD = 20


def make_sampler(
    kind: str, seed: int, front: Callable[[], Sequence[FrozenTrial]] | None = None
) -> BaseSampler:
    """front | tpe | nsga2 | random, reseeded by the caller after a restart.

    front: what is on the front now, which the sampler of that name starts from.
    """
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    with warnings.catch_warnings():
        # `group` is what makes TPE work on conditional spaces; Optuna marks it experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=seed
        )
    if kind == "tpe":
        return tpe
    assert kind == "front" and front is not None, kind
    return NearFront(tpe, front, seed)


class NearFront(BaseSampler):
    """Half of the proposals are another sampler's, half a member of the front with its numbers
    moved a little: fronts of one model are smooth, a method's next best setting is near its best.
    """

    def __init__(
        self, other: BaseSampler, front: Callable[[], Sequence[FrozenTrial]], seed: int
    ) -> None:
        self.other, self.front = other, front
        self.rng = np.random.default_rng(seed)
        self.start: dict[str, Any] = {}
        self.step = 0.0

    def reseed_rng(self) -> None:
        self.rng = np.random.default_rng()
        self.other.reseed_rng()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.start = {}
        self.other.before_trial(study, trial)
        members = [t for t in self.front() if t.params]
        if members and self.rng.integers(100) < NEAR:
            self.start = members[int(self.rng.integers(len(members)))].params
            low, high = (math.log(step) for step in STEPS)
            self.step = math.exp(self.rng.uniform(low, high))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {} if self.start else self.other.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {} if self.start else self.other.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        old = self.start.get(param_name)
        if old is not None and _holds(param_distribution, old):
            return self._moved(old, param_distribution)
        return self.other.sample_independent(study, trial, param_name, param_distribution)

    def _moved(self, old: Any, among: BaseDistribution) -> Any:
        if isinstance(among, CategoricalDistribution):
            if self.rng.integers(100) >= OTHER_WORD:
                return old
            return among.choices[int(self.rng.integers(len(among.choices)))]
        assert isinstance(among, (FloatDistribution, IntDistribution))
        low, high = float(among.low), float(among.high)
        at = float(old)
        if among.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        at = min(high, max(low, at + self.step * (high - low) * self.rng.standard_normal()))
        new = math.exp(at) if among.log else at
        if isinstance(among, IntDistribution):
            return int(min(among.high, max(among.low, round(new))))
        return min(among.high, max(among.low, new))

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self.other.after_trial(study, trial, state, values)


def _holds(among: BaseDistribution, value: Any) -> bool:
    """Whether it may be proposed: a member may be of a wider space, before a job was narrowed."""
    if isinstance(among, CategoricalDistribution):
        return value in among.choices
    assert isinstance(among, (FloatDistribution, IntDistribution))
    return bool(among.low <= value <= among.high)
