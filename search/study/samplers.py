"""Optuna's samplers, by the names that a job has for them."""

from __future__ import annotations

import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


class GroupTPE(optuna.samplers.TPESampler):
    """Optuna's multivariate TPE on conditional spaces (`group`), for long studies.

    Optuna draws the parameters of every group, each method's among them, before a proposal is asked
    for the first, and looks through all trials for the groups each time. A proposal uses two or
    three groups of a dozen: here a group is drawn when its first parameter is asked for, and a
    trial is looked at once. Where a space is one group the proposals are Optuna's, to the bit.
    """

    def __init__(self, seed: int) -> None:
        with warnings.catch_warnings():
            # `group` is what makes TPE work on conditional spaces; Optuna marks it experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(multivariate=True, group=True, constant_liar=True, seed=seed)
        self._warn_independent_sampling = False  # that is the way in here
        self._groups, self._seen = _SearchSpaceGroup(), set[int]()
        #: what is drawn for the trial in hand
        self._drawn: dict[str, Any] = {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Empty: parameters are asked for one by one."""
        self._drawn = {}
        complete = (TrialState.COMPLETE,)
        for past in study._get_trials(deepcopy=False, states=complete, use_cache=True):
            if past.number not in self._seen:
                self._seen.add(past.number)
                self._groups.add_distributions(past.distributions)
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """This parameter, drawn with all of its group; by itself where it is new to the study."""
        if param_name not in self._drawn:
            group = next((g for g in self._groups.search_spaces if param_name in g), {})
            if group.get(param_name) == param_distribution:
                # sorted, as the order of a set's names is another one in every process
                several = {n: d for n, d in sorted(group.items()) if not d.single()}
                self._drawn |= self._sample_relative(study, trial, several)
        if param_name in self._drawn:
            return self._drawn[param_name]
        return super().sample_independent(study, trial, param_name, param_distribution)


def make_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """One of `choices.SAMPLERS`; the caller gives another seed after a restart."""
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return GroupTPE(seed)
