"""The private parts of Optuna that this package relies on.

Optuna has no public way to draw one group of a conditional space, to reopen a trial of an earlier
process, or to set an attribute of a trial by its number. Whatever does so is here, and nowhere
else; pyproject.toml caps Optuna at the versions that the tests passed with.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.search_space.group_decomposed import _SearchSpaceGroup
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState


def reopened(study: Study, frozen: FrozenTrial) -> optuna.Trial:
    """Return the live trial of a RUNNING trial that an earlier process asked for."""
    return optuna.Trial(study, frozen._trial_id)


def set_trial_attribute(study: Study, number: int, name: str, value: Any) -> None:
    """Set a user attribute of a trial by its number; no effect if the trial is finished."""
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        study._storage.set_trial_user_attr(trial_id, name, value)


class GroupTPE(optuna.samplers.TPESampler):
    """Optuna's multivariate TPE for conditional spaces (`group=True`), fast in long studies.

    Optuna's own draws the parameters of all groups, one per method, before the first parameter is
    suggested, and reads all trials to find the groups each time. A proposal uses two or three
    groups of a dozen. This one draws a group when its first parameter is suggested, and reads each
    trial once. If the space is one group, the proposals are identical to Optuna's.
    """

    def __init__(self, seed: int) -> None:
        with warnings.catch_warnings():
            # Optuna marks `group` as experimental; TPE needs it for conditional spaces
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(multivariate=True, group=True, constant_liar=True, seed=seed)
        # every parameter is sampled "independently" here, and the warning would be wrong
        self._warn_independent_sampling = False
        self._groups, self._seen = _SearchSpaceGroup(), set[int]()
        #: values drawn for the current trial
        self._drawn: dict[str, Any] = {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return an empty space, so that parameters are suggested one by one."""
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
        """Draw the parameter's whole group; the parameter alone if the study does not know it."""
        if param_name not in self._drawn:
            group = next((g for g in self._groups.search_spaces if param_name in g), {})
            if group.get(param_name) == param_distribution:
                # sorted, because the order of a set of names differs between processes
                space = {n: d for n, d in sorted(group.items()) if not d.single()}
                self._drawn |= self._sample_relative(study, trial, space)
        if param_name in self._drawn:
            return self._drawn[param_name]
        return super().sample_independent(study, trial, param_name, param_distribution)
