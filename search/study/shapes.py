"""The model's shape after a recipe's structural step, for costs that are needed before it runs.

Only the model's skeleton is used, no weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe, Step
from vitpareto.methods.engine.preparation import PreparationOutcome, not_prepared


class ShapeFinder:
    """Recipe -> the model's shape after its structural step, computed once per step.

    Until the outcome of a preparation is known (`use_outcomes`), the step has the shape that the
    method gives without trained weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.skeleton = copy.deepcopy(model).to("meta")
        self.dense = methods.model_shape(self.skeleton)
        self.outcomes: Mapping[str, PreparationOutcome] | None = None
        self.found: dict[str, ModelShape] = {}

    def use_outcomes(self, outcomes: Mapping[str, PreparationOutcome]) -> None:
        """From now on prepared structural methods have their outcome's shapes, and no others."""
        self.outcomes = outcomes
        self.found.clear()

    def __call__(self, recipe: Recipe) -> ModelShape:
        """Raises BadInput for a structural step that is not prepared, once outcomes are known."""
        if recipe.structure is None:
            return self.dense
        step = str(recipe.structure.plain())
        if step not in self.found:
            self.found[step] = self._shape(recipe.structure)
        return self.found[step]

    def _shape(self, structure: Step) -> ModelShape:
        declared = structure.declared
        prepared = declared.needs_preparation and declared.shaped_by_weights(structure.params)
        if prepared and self.outcomes is not None:
            if structure.method not in self.outcomes:
                raise not_prepared(structure.method)
            params = self.outcomes[structure.method].shape_params(structure.params)
            structure = Step(structure.method, params)
        return Recipe(structure=structure).reshape(self.dense, self.skeleton)[0]
