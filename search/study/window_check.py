"""Whether a search space contains recipes inside a budget window, by drawing from it."""

from __future__ import annotations

from collections.abc import Callable

from vitpareto.methods import BadInput, ModelShape, Recipe
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.space import Space

#: proposals drawn before a window counts as unreachable
PROBES = 300


def check_window(
    space: Space, window: BudgetWindow, reshape: Callable[[Recipe], ModelShape]
) -> None:
    """Raise UserError if none of PROBES random recipes can cost what the window accepts."""
    if window.is_open:
        return
    # imported here: a single measurement has no window and must start without Optuna
    import optuna

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    costs: list[float] = []
    for _ in range(PROBES):
        try:
            recipe = space.suggest(study.ask(), reshape)
            low, high = (m / 1e9 for m in recipe_macs(recipe, reshape(recipe)))
        except BadInput:  # a choice that this model does not allow
            continue
        costs += [low, high]
        if window.violation_between(low, high) <= 0:
            return
    dense = recipe_macs(Recipe(), reshape(Recipe()))[0] / 1e9
    lowest, highest = min(costs, default=dense), max(costs, default=dense)
    raise UserError(
        f"min_gmacs and max_gmacs must leave a recipe of {', '.join(space.methods)} to search (got "
        f"{window}); its recipes cost {lowest:.4g} to {highest:.4g} GMACs, the dense model "
        f"{dense:.4g}",
        Code.EMPTY,
        low=window.low,
        high=window.high,
        lowest=lowest,
        highest=highest,
        dense=dense,
    )
