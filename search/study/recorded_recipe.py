"""A recipe as files hold it: readable even where a method of it is not registered.

`Recipe` refuses methods that this version does not know; results of other versions name such ones.
Data only: it may not measure, read or write anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitpareto import methods
from vitpareto.methods import BadInput, Recipe
from vitpareto.methods.engine.step import Step


@dataclass(frozen=True)
class RecordedStep:
    """One step of a recipe.

    Attributes:
        method: its name; it need not be registered.
        params: its parameters by name, as JSON values.
    """

    method: str
    params: Mapping[str, Any]

    @classmethod
    def of(cls, step: Step | None) -> RecordedStep | None:
        """The record of a step; None for none."""
        return None if step is None else cls.from_json(step.plain())

    @classmethod
    def from_json(cls, stored: Mapping[str, Any] | None) -> RecordedStep | None:
        """The step of a file's JSON; None if there is none."""
        if not stored:
            return None
        params = {name: value for name, value in stored.items() if name != "method"}
        return cls(str(stored["method"]), params)

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, **self.params}


@dataclass(frozen=True)
class RecordedRecipe:
    """What was done to a model; the empty recipe is the dense model.

    Attributes:
        structure, tokens: the steps, None where the recipe has none.
        weights: digest of the trained state dict of the built model, if the recipe names one.
    """

    structure: RecordedStep | None = None
    tokens: RecordedStep | None = None
    weights: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> RecordedRecipe:
        """The record of a recipe."""
        return cls(
            RecordedStep.of(recipe.structure), RecordedStep.of(recipe.tokens), recipe.weights
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RecordedRecipe:
        """The recipe of a file's JSON (`Recipe.to_dict`). Raises TypeError for an unknown key."""
        steps = {part: RecordedStep.from_json(stored.get(part)) for part in ("structure", "tokens")}
        return cls(**{**stored, **steps})

    def to_json(self) -> dict[str, Any]:
        """The recipe for a file, as `Recipe.to_dict` gives it."""
        parts = {"structure": self.structure, "tokens": self.tokens}
        out: dict[str, Any] = {p: step.to_json() for p, step in parts.items() if step is not None}
        return out if self.weights is None else {**out, "weights": self.weights}

    def to_recipe(self) -> Recipe:
        """The recipe that can be built. Raises BadInput if a method is not registered."""
        return Recipe.from_dict(self.to_json())

    @property
    def steps(self) -> tuple[RecordedStep, ...]:
        """The steps, the structural one first."""
        return tuple(step for step in (self.structure, self.tokens) if step is not None)

    @property
    def method(self) -> str:
        """The methods' names, the structural one first, such as `nvit+topk`; or "dense"."""
        return "+".join(step.method for step in self.steps) or Recipe().method

    @property
    def only_controls(self) -> bool:
        """Whether all steps are controls; true for the dense model."""
        try:
            return all(methods.get(step.method).control for step in self.steps)
        except BadInput:  # a method of another version; controls of all versions are known
            return False

    def __str__(self) -> str:
        """The recipe in one line; the methods' names where one is not registered."""
        try:
            return str(self.to_recipe())
        except BadInput:  # written by a version with other methods
            return self.method
