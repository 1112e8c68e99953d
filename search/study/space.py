"""The methods' declared parameters -> Optuna's define-by-run space, narrowed by the job.

One categorical `method`, then, beneath a token method where the job has structural ones, one
categorical `structure`, then the parameters of both as `method.parameter`: conditional, and in
relative units, so that a finding carries over to another depth or patch count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vitpareto import methods
from vitpareto.methods import BadInput, ModelShape, Recipe, Step
from vitpareto.methods.engine.parameters import Choice, Float, Int, Parameter
from vitpareto.search.errors import Code, UserError, nearest

if TYPE_CHECKING:  # a measurement without a search starts without Optuna
    import optuna

#: beneath a token method: nothing; and the word of `space` and `fixed` for what may lie there
NONE, STRUCTURE = "none", "structure"


@dataclass(frozen=True)
class Space:
    """What a study may propose: `parameters[method]` are asked, `fixed[method]` are given, and
    `structures` are what may lie beneath a token method ("none" among them, unless left out).
    """

    methods: tuple[str, ...]
    parameters: dict[str, tuple[Parameter, ...]]
    fixed: dict[str, dict[str, Any]]
    structures: tuple[str, ...]
    #: tokens, prefix included -> as many or more, to which fixed schedules are lifted; None: as is
    snap: Callable[[int], int] | None = None

    @classmethod
    def of(
        cls, names: tuple[str, ...], space: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> Space:
        """UserError for an unknown method or parameter (nearest) and for what is out of range."""
        if not names:
            raise UserError("methods must name at least one method besides dense", Code.EMPTY)
        declared = {n: {p.name: p for p in methods.get(n).space} for n in names}
        held: dict[str, dict[str, Any]] = {n: {} for n in names}
        beneath: tuple[str, ...] = (NONE, *filter(_lies_beneath, names))
        for where, given in (("space", space), ("fixed", fixed)):
            for key, value in given.items():
                if key == STRUCTURE:
                    beneath = _some_of(where, value, beneath)
                    continue
                method, parameter = _find(where, key, declared)
                if where == "space":
                    declared[method][parameter.name] = _narrow(key, parameter, value)
                else:
                    held[method][parameter.name] = parameter.check(value, f"fixed: {method}")
        parameters = {n: tuple(declared[n].values()) for n in names}
        return cls(tuple(names), parameters, held, beneath)

    def suggest(self, trial: optuna.Trial, shape_of: Callable[[Recipe], ModelShape]) -> Recipe:
        """Ask the trial for a method, the structure beneath it and their choices, and resolve them.

        shape_of: the model's shape after a recipe's structural step; what a token method's relative
        choices are relative to.
        """
        name = str(trial.suggest_categorical("method", list(self.methods)))
        shape = shape_of(Recipe())
        if methods.get(name).kind == "structure":
            return resolve(name, self._choices(trial, name), shape)
        below = self.structures[0]
        if len(self.structures) > 1:
            below = str(trial.suggest_categorical(STRUCTURE, list(self.structures)))
        structure = Recipe()
        if below != NONE:
            structure = resolve(below, self._choices(trial, below), shape)
        under = shape_of(structure)
        tokens = resolve(name, self._choices(trial, name), under)
        if self.snap is not None:
            tokens = snapped(tokens, under, self.snap)
        return replace(tokens, structure=structure.structure)

    def _choices(self, trial: optuna.Trial, name: str) -> dict[str, Any]:
        """Ask for what the job left open of a method's choices."""
        choices: dict[str, Any] = {}
        for p in self.parameters[name]:
            if p.when is not None and choices.get(p.when[0]) not in p.when[1]:
                continue
            if p.name in self.fixed[name]:
                choices[p.name] = self.fixed[name][p.name]
            else:
                choices[p.name] = _ask(trial, f"{name}.{p.name}", p)
        return choices

    def preset_params(self) -> list[tuple[str, dict[str, Any]]]:
        """The published settings inside this space, as (name, Optuna parameters)."""
        out = []
        for name in self.methods:
            for preset in methods.get(name).presets:
                params = self._params_of(name, preset.choices)
                if params is not None:
                    out.append((f"{name} {preset.name}", params))
        return out

    def _params_of(self, name: str, choices: Mapping[str, Any]) -> dict[str, Any] | None:
        """Choices as Optuna parameters; None where the job's narrowing leaves them out."""
        params: dict[str, Any] = {"method": name}
        if methods.get(name).kind == "tokens":
            if NONE not in self.structures:  # published on the model itself
                return None
            if len(self.structures) > 1:
                params[STRUCTURE] = NONE
        for p in self.parameters[name]:
            if p.when is not None and choices.get(p.when[0]) not in p.when[1]:
                continue
            if p.name not in choices:  # published in the recipe's own words, not in the search's
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
    """Relative choices -> the absolute recipe for a model of this shape."""
    method = methods.get(name)
    step = Step(name, method.check(method.resolve(choices, shape), shape))
    return Recipe(structure=step) if method.kind == "structure" else Recipe(tokens=step)


def snapped(recipe: Recipe, shape: ModelShape, snap: Callable[[int], int]) -> Recipe:
    """The recipe with every block's tokens lifted to the end of their step: as many patches more
    as cost nothing. A block that drops none drops none afterwards. The recipe itself where its
    method takes no `counts`, where images decide them, or where it cannot merge so many at once.
    """
    step = recipe.tokens
    counts = None if step is None else step.declared.counts(step.params, shape)
    if step is None or counts is None:
        return recipe
    lifted: list[int] = []
    before, left = shape.patches, shape.patches
    for count in counts:
        if count < before:
            left = min(left, snap(count + shape.prefix) - shape.prefix)
        before = count
        lifted.append(left)
    if tuple(lifted) == counts:
        return recipe
    given = step.declared.with_counts(step.params, tuple(lifted))
    if given is None:
        return recipe
    try:
        params = step.declared.check(given, shape)
    except BadInput:
        return recipe
    return replace(recipe, tokens=Step(step.method, params))


def _lies_beneath(name: str) -> bool:
    """Whether token methods are searched on top of this one: not where every candidate of it is
    trained by itself, which is a training for each of its settings already.
    """
    method = methods.get(name)
    return method.kind == "structure" and (method.training != "required" or method.trained_once)


def _some_of(where: str, value: Any, structures: tuple[str, ...]) -> tuple[str, ...]:
    """The structures that a job narrows to: several under `space`, one under `fixed`."""
    wanted = list(value) if where == "space" and isinstance(value, (list, tuple)) else [value]
    if not wanted:
        raise UserError(
            f"{where}: {STRUCTURE} must be one or more of {', '.join(structures)} (got {value!r})",
            Code.OUT_OF_RANGE, where=where, key=STRUCTURE, got=value,
        )  # fmt: skip
    for one in wanted:
        if one not in structures:
            raise UserError(
                f"{where}: {STRUCTURE} must be one of {', '.join(structures)} (got {one!r})"
                f"{nearest(one, structures)}",
                Code.UNKNOWN_NAME, where=where, key=STRUCTURE, got=one,
            )  # fmt: skip
    return tuple(s for s in structures if s in wanted)


def _find(
    where: str, key: str, declared: Mapping[str, Mapping[str, Parameter]]
) -> tuple[str, Parameter]:
    method, _, name = key.partition(".")
    if method not in declared:
        raise UserError(
            f"{where}: the method of {key!r} is not part of this search{nearest(method, declared)}",
            Code.UNKNOWN_NAME,
            where=where,
            key=key,
            name=method,
        )
    if name not in declared[method]:
        raise UserError(
            f"{where}: {method} has no parameter {name!r} to search"
            f"{nearest(name, declared[method])}",
            Code.UNKNOWN_NAME,
            where=where,
            key=key,
            name=name,
        )
    return method, declared[method][name]


def _narrow(key: str, p: Parameter, value: Any) -> Parameter:
    """`p` with the user's bounds [low, high], or its list of choices, if these are inside `p`."""
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


def _ask(trial: optuna.Trial, name: str, p: Parameter) -> Any:
    if isinstance(p, Float):
        return trial.suggest_float(name, p.low, p.high, log=p.log)
    if isinstance(p, Int):
        return trial.suggest_int(name, p.low, p.high, log=p.log)
    assert isinstance(p, Choice), f"{type(p).__name__} cannot be searched"
    return trial.suggest_categorical(name, list(p.choices))
