"""The setting of a method at a rate, so that methods can be compared at equal rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, ModelShape, Recipe
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.parameters import Counts, Float, Int
from vitpareto.methods.engine.staged import LAYERS_SPACE
from vitpareto.search.measure.closed_form import recipe_macs

#: names of choices that are a rate: the fraction of patches kept at each prune layer
RATES = ("keep_rate", "rate")
#: values of a choice that are tried to reach a cost
STEPS = 256

KEPT = "keep rate"
NEAREST = "MACs nearest TopK's"
AT_MOST = "at most: nearest TopK's"
GIVEN = "TopK's counts"


@dataclass(frozen=True)
class MatchedSetting:
    """A recipe at a rate, and the rule that matched it: KEPT, NEAREST, AT_MOST or GIVEN."""

    recipe: Recipe
    rule: str


def setting_at(method: str, rate: float, shape: ModelShape, skeleton: nn.Module) -> MatchedSetting:
    """The method's setting at a rate, derived from its first preset.

    1. A choice that is a rate gets the value `rate`.
    2. If images decide the counts and the method accepts given counts, it gets TopK's counts.
    3. Otherwise the first choice that is not about layers is varied within the method's space until
       the MACs (their maximum, if images decide) are nearest to TopK's at that rate.

    Args:
        rate: fraction of patches kept at each prune layer.
        shape: dimensions of the model.
        skeleton: the model, without weights.

    Raises:
        BadInput: the method has no preset, or no setting fits the model.
    """
    declared = methods.get(method)
    if not declared.presets:
        raise BadInput(
            f"method {method!r} has no published setting to start from",
            Code.UNSUPPORTED,
            method=method,
        )
    choices = dict(declared.presets[0].choices)
    for name in RATES:
        if name in choices:
            params = declared.resolve({**choices, name: rate}, shape)
            return MatchedSetting(_recipe(declared, declared.check(params, shape)), KEPT)
    topk = setting_at("topk", rate, shape, skeleton).recipe.checked(shape)
    adaptive = declared.kind == "tokens" and (
        declared.counts(declared.preset(declared.presets[0], shape), shape) is None
    )
    if adaptive and any(isinstance(p, Counts) for p in declared.parameters):
        assert topk.tokens is not None
        counts = topk.tokens.declared.counts(topk.tokens.params, shape)
        return MatchedSetting(_recipe(declared, declared.check({"counts": counts}, shape)), GIVEN)
    target = recipe_macs(topk, shape)[1]
    varied = _varied_choice(declared, choices)
    found: dict[str, tuple[int, Recipe]] = {}
    refused = ""
    for value in _values(varied):
        try:
            params = declared.check(declared.resolve({**choices, varied.name: value}, shape), shape)
            recipe = _recipe(declared, params)
            if str(recipe) not in found:
                cost = recipe_macs(recipe, recipe.reshape(shape, skeleton)[0])[1]
                found[str(recipe)] = (abs(cost - target), recipe)
        except BadInput as error:
            refused = str(error)
    if not found:
        raise BadInput(
            f"no setting of {method} fits the model: {refused}", Code.UNSUPPORTED, method=method
        )
    nearest = min(found.values(), key=lambda pair: pair[0])[1]
    return MatchedSetting(nearest, AT_MOST if adaptive else NEAREST)


def _recipe(declared: Method, params: dict[str, Any]) -> Recipe:
    return Recipe.of(declared.name, **{k: v for k, v in params.items() if v is not None})


def _varied_choice(declared: Method, choices: dict[str, Any]) -> Float | Int:
    """The choice that `setting_at` varies: the first number of the space that is not a layer's."""
    layers = {p.name for p in LAYERS_SPACE}
    for p in declared.space:
        if isinstance(p, (Float, Int)) and p.name in choices and p.name not in layers:
            return p
    raise BadInput(
        f"method {declared.name!r} has no numeric choice that changes its cost",
        Code.UNSUPPORTED,
        method=declared.name,
    )


def _values(choice: Float | Int) -> list[float]:
    """Evenly spaced over the choice's range, on a log scale if the search uses one."""
    if isinstance(choice, Int):
        return list(range(choice.low, min(choice.high, choice.low + STEPS) + 1))
    steps = [i / STEPS for i in range(STEPS + 1)]
    if choice.log:
        return [choice.low * (choice.high / choice.low) ** s for s in steps]
    return [choice.low + (choice.high - choice.low) * s for s in steps]
