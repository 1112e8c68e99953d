"""Proposals of candidates by Optuna, filtered before they reach a worker.

A candidate that is already measured is completed with its known values. A candidate outside the
budget window is completed as a constraint violation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import optuna

from vitpareto.methods import BadInput, ModelShape, Recipe
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.optuna_trials import OptunaTrials
from vitpareto.search.study.progress import StudyProgress
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.space import Space


@dataclass
class Proposal:
    """A candidate to measure; `waiting` are later trials with the same candidate."""

    trial: optuna.Trial
    key: str
    recipe: Recipe
    waiting: list[optuna.Trial] = field(default_factory=list)

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    def config(self) -> dict[str, Any]:
        """Return what a worker gets."""
        return {"trial": self.number, "key": self.key, "recipe": self.recipe.to_dict()}


class Proposals:
    """Asks for candidates that have to be measured, and tells the others at once."""

    def __init__(
        self,
        trials: OptunaTrials,
        space: Space,
        window: BudgetWindow,
        shape_of: Callable[[Recipe], ModelShape],
        progress: StudyProgress,
    ) -> None:
        """shape_of: returns the model's shape after a recipe's structural step."""
        self.trials, self.space, self.window = trials, space, window
        self.shape_of, self.progress = shape_of, progress
        #: the first result of every candidate, by key
        self.known: dict[str, TrialResult] = {}
        #: violations of the budget window in GMACs, by key
        self.outside: dict[str, float] = {}

    def remember(self, result: TrialResult) -> None:
        """Add a durable result, under the keys of the recipe as measured and as proposed."""
        self.known.setdefault(result.key, result)
        if result.resolved is not None:
            # a calibrated recipe has another key once it is resolved
            recipe = result.recipe.to_recipe()
            self.known.setdefault(recipe.key(self.shape_of(recipe)), result)

    def ask(self, running: Iterable[Proposal]) -> Proposal | None:
        """Ask Optuna once; None if the candidate needs no measurement.

        Args:
            running: proposals that workers measure now.
        """
        trial = self.trials.ask()
        try:
            recipe = Recipe()
            if not trial.user_attrs.get("reference"):
                recipe = self.space.suggest(trial, self.shape_of)
            shape = self.shape_of(recipe)
        except BadInput as error:  # a choice that this model does not allow
            self.trials.tell_invalid(trial, str(error))
            return None
        key = recipe.key(shape)
        trial.set_user_attr("recipe", recipe.to_dict())
        trial.set_user_attr("key", key)
        known = self.known.get(key)
        if known is not None:
            trial.set_user_attr("duplicate_of", known.trial)
            self.progress.duplicates += 1
            self.trials.tell(trial.number, known)
            return None
        for other in running:
            if other.key == key:
                trial.set_user_attr("duplicate_of", other.number)
                self.progress.duplicates += 1
                other.waiting.append(trial)
                return None
        if recipe != Recipe():
            violation = self.outside.get(key, self._violation(recipe, shape))
            if violation > 0:
                self.tell_outside(trial, key, violation)
                return None
        return Proposal(trial, key, recipe)

    def tell_outside(self, trial: optuna.Trial, key: str, violation: float) -> None:
        """Tell that a candidate is outside the window, and remember it.

        violation: distance to the window in GMACs.
        """
        self.outside[key] = violation
        self.progress.outside += 1
        self.trials.tell_outside(trial, violation)

    def _violation(self, recipe: Recipe, shape: ModelShape) -> float:
        """Return the distance of the recipe's possible costs to the window, in GMACs."""
        low, high = (m / 1e9 for m in recipe_macs(recipe, shape))
        ceiling = self.window.high
        if recipe.structure is not None:
            # a structure that costs more than the dense model (ReViT may) is not a reduction of it
            dense = recipe_macs(Recipe(), self.shape_of(Recipe()))[0] / 1e9
            ceiling = dense if ceiling is None else min(ceiling, dense)
        return BudgetWindow(self.window.low, ceiling).violation_between(low, high)
