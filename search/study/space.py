"""The search space: the methods' declared parameters as Optuna's define-by-run parameters.

The first parameter is the categorical `method`. A token method is followed by the categorical
`structure` if the job searches structural methods. The parameters of both follow as
`method.parameter`. They are conditional and in relative units, so that results carry over to models
of another depth or number of patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vitpareto import methods
from vitpareto.methods import BadInput, ModelShape, Recipe, Step
from vitpareto.methods.engine.method_registry import NONE
from vitpareto.methods.engine.parameters import Choice, Float, Int, Parameter
from vitpareto.search.errors import Code, UserError

if TYPE_CHECKING:  # commands that do not search start without Optuna
    import optuna

#: The key of `space` and `fixed` that narrows the structures.
STRUCTURE = "structure"


@dataclass(frozen=True)
class Space:
    """What a study may propose.

    Attributes:
        methods: names of the methods.
        parameters: parameters that Optuna suggests, by method.
        fixed: parameters that the job fixes, by method.
        structures: structural methods that token methods are combined with; "none" is the model
            itself.
        snap: rounds a number of tokens, prefix included, up to the end of its latency step; None
            leaves schedules unchanged.
    """

    methods: tuple[str, ...]
    parameters: dict[str, tuple[Parameter, ...]]
    fixed: dict[str, dict[str, Any]]
    structures: tuple[str, ...]
    snap: Callable[[int], int] | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], space: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> Space:
        """Return the space of these methods, narrowed by the job.

        Args:
            names: of the methods.
            space: bounds or choices by "method.parameter", and "structure".
            fixed: values by "method.parameter", and "structure".

        Raises:
            BadInput: an unknown method or parameter, or a value that is out of range.
        """
        if not names:
            raise UserError("methods must name at least one method besides dense", Code.EMPTY)
        declared = {n: {p.name: p for p in methods.get(n).space} for n in names}
        fixed_values: dict[str, dict[str, Any]] = {n: {} for n in names}
        structures: tuple[str, ...] = (NONE, *filter(_combines_with_tokens, names))
        for where, given in (("space", space), ("fixed", fixed)):
            for key, value in given.items():
                if key == STRUCTURE:
                    structures = _narrow_structures(where, value, structures)
                    continue
                method, parameter = _find(where, key, declared)
                if where == "space":
                    declared[method][parameter.name] = _narrow(key, parameter, value)
                else:
                    fixed_values[method][parameter.name] = parameter.check(
                        value, f"fixed: {method}"
                    )
        parameters = {n: tuple(declared[n].values()) for n in names}
        return cls(tuple(names), parameters, fixed_values, structures)

    def suggest(self, trial: optuna.Trial, shape_of: Callable[[Recipe], ModelShape]) -> Recipe:
        """Return the recipe that the trial suggests.

        Args:
            trial: suggests the method, its structure and their parameters.
            shape_of: returns the model's shape after a recipe's structural step, which a token
                method's choices are relative to.
        """
        name = str(trial.suggest_categorical("method", list(self.methods)))
        shape = shape_of(Recipe())
        if methods.get(name).kind == "structure":
            return resolve(name, self._choices(trial, name), shape)
        structure_name = self.structures[0]
        if len(self.structures) > 1:
            structure_name = str(trial.suggest_categorical(STRUCTURE, list(self.structures)))
        structure = Recipe()
        if structure_name != NONE:
            structure = resolve(structure_name, self._choices(trial, structure_name), shape)
        token_shape = shape_of(structure)
        tokens = resolve(name, self._choices(trial, name), token_shape)
        if self.snap is not None:
            tokens = snapped(tokens, token_shape, self.snap)
        return replace(tokens, structure=structure.structure)

    def _choices(self, trial: optuna.Trial, name: str) -> dict[str, Any]:
        """Return a method's choices, fixed by the job or suggested by the trial."""
        choices: dict[str, Any] = {}
        for p in self.parameters[name]:
            if p.when is not None and choices.get(p.when[0]) not in p.when[1]:
                continue
            if p.name in self.fixed[name]:
                choices[p.name] = self.fixed[name][p.name]
            else:
                choices[p.name] = _suggest(trial, f"{name}.{p.name}", p)
        return choices

    def preset_params(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the published settings inside this space, as (name, Optuna parameters)."""
        presets = []
        for name in self.methods:
            for preset in methods.get(name).presets:
                params = self._params_of(name, preset.choices)
                if params is not None:
                    presets.append((f"{name} {preset.name}", params))
        return presets

    def _params_of(self, name: str, choices: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return choices as Optuna parameters; None if they are outside the space."""
        params: dict[str, Any] = {"method": name}
        if methods.get(name).kind == "tokens":
            if NONE not in self.structures:  # presets are for the model itself
                return None
            if len(self.structures) > 1:
                params[STRUCTURE] = NONE
        for p in self.parameters[name]:
            if p.when is not None and choices.get(p.when[0]) not in p.when[1]:
                continue
            if p.name not in choices:  # the preset is not expressed in search parameters
                return None
            value = choices[p.name]
            if p.name in self.fixed[name]:
                if self.fixed[name][p.name] != value:
                    return None
            elif not _contains(p, value):
                return None
            else:
                params[f"{name}.{p.name}"] = value
        return params


def resolve(name: str, choices: dict[str, Any], shape: ModelShape) -> Recipe:
    """Return the recipe of relative choices for a model of this shape."""
    method = methods.get(name)
    step = Step(name, method.check(method.resolve(choices, shape), shape))
    return Recipe(structure=step) if method.kind == "structure" else Recipe(tokens=step)


def snapped(recipe: Recipe, shape: ModelShape, snap: Callable[[int], int]) -> Recipe:
    """Return the recipe with every block's tokens raised to the end of their latency step.

    The additional patches do not increase latency. A block that drops no patches still drops none.
    The recipe is unchanged if its method has no `counts`, if images decide them, or if the method
    does not allow the raised counts.
    """
    step = recipe.tokens
    counts = None if step is None else step.declared.counts(step.params, shape)
    if step is None or counts is None:
        return recipe
    raised: list[int] = []
    before, remaining = shape.patches, shape.patches
    for count in counts:
        if count < before:
            remaining = min(remaining, snap(count + shape.prefix) - shape.prefix)
        before = count
        raised.append(remaining)
    if tuple(raised) == counts:
        return recipe
    params_with_counts = step.declared.with_counts(step.params, tuple(raised))
    if params_with_counts is None:
        return recipe
    try:
        params = step.declared.check(params_with_counts, shape)
    except BadInput:
        return recipe
    return replace(recipe, tokens=Step(step.method, params))


def _combines_with_tokens(name: str) -> bool:
    """Return whether token methods are searched on top of this structural method.

    A method that trains every candidate separately is not combined: every combination would need a
    training.
    """
    method = methods.get(name)
    return method.kind == "structure" and (
        method.training != "required" or method.needs_preparation
    )


def _narrow_structures(where: str, value: Any, structures: tuple[str, ...]) -> tuple[str, ...]:
    """Return the structures of the job: one or more under `space`, one under `fixed`."""
    wanted = list(value) if where == "space" and isinstance(value, (list, tuple)) else [value]
    if not wanted:
        raise UserError(
            f"{where}: {STRUCTURE} must be one or more of {', '.join(structures)} (got {value!r})",
            Code.OUT_OF_RANGE, where=where, key=STRUCTURE, got=value,
        )  # fmt: skip
    for name in wanted:
        if name not in structures:
            raise UserError.unknown(
                f"{where}: {STRUCTURE} must be one of {', '.join(structures)} (got {name!r})",
                name,
                structures,
                where=where,
                key=STRUCTURE,
                got=name,
            )
    return tuple(s for s in structures if s in wanted)


def _find(
    where: str, key: str, declared: Mapping[str, Mapping[str, Parameter]]
) -> tuple[str, Parameter]:
    method, _, name = key.partition(".")
    if method not in declared:
        raise UserError.unknown(
            f"{where}: the method of {key!r} is not part of this search",
            method,
            declared,
            where=where,
            key=key,
            name=method,
        )
    if name not in declared[method]:
        raise UserError.unknown(
            f"{where}: {method} has no parameter {name!r} to search",
            name,
            declared[method],
            where=where,
            key=key,
            name=name,
        )
    return method, declared[method][name]


def _narrow(key: str, p: Parameter, value: Any) -> Parameter:
    """Return the parameter with the job's bounds [low, high] or choices."""
    where = f"space: {key.partition('.')[0]}"
    if isinstance(p, Choice):
        wanted = value if isinstance(value, (list, tuple)) else [value]
        if not wanted:
            raise UserError(
                f"space: {key} must be one or more of {p.accepts} (got {value!r})",
                Code.OUT_OF_RANGE, where="space", key=key, got=value,
            )  # fmt: skip
        return replace(p, choices=tuple(dict.fromkeys(p.check(v, where) for v in wanted)))
    assert isinstance(p, (Float, Int))
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UserError(
            f"space: {key} must be [low, high] (got {value!r})",
            Code.WRONG_TYPE, where="space", key=key, got=value,
        )  # fmt: skip
    bounds: list[Any] = [p.check(v, where) for v in value]
    low, high = bounds
    if low > high:
        raise UserError(
            f"space: {key} must have low <= high (got {value!r})",
            Code.OUT_OF_RANGE, where="space", key=key, got=value,
        )  # fmt: skip
    return replace(p, low=low, high=high)


def _contains(p: Parameter, value: Any) -> bool:
    if isinstance(p, Choice):
        return value in p.choices
    assert isinstance(p, (Float, Int))
    return p.low <= value <= p.high


def _suggest(trial: optuna.Trial, name: str, p: Parameter) -> Any:
    if isinstance(p, Float):
        return trial.suggest_float(name, p.low, p.high, log=p.log)
    if isinstance(p, Int):
        return trial.suggest_int(name, p.low, p.high, log=p.log)
    assert isinstance(p, Choice), f"{type(p).__name__} cannot be searched"
    return trial.suggest_categorical(name, list(p.choices))
