"""What shape a recipe's structural step gives the model, for the costs that decide before it runs.

No weight is held: the model's skeleton alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe, Step
from vitpareto.methods.slicing.sliced_model import Widths, sliced_model
from vitpareto.search.training.snapshots import Snapshot, snapshot_of


class ShapeFinder:
    """Recipe -> the model's shape after its structural step, computed once a step.

    Until NViT's snapshots are known, a target of it means what it does without scores: widths that
    cost as much (`methods.structure.nvit`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.skeleton = copy.deepcopy(model).to("meta")
        self.dense = methods.model_shape(self.skeleton)
        self.snapshots: Mapping[float, Snapshot] | None = None
        self.found: dict[str, ModelShape] = {}

    def know(self, snapshots: Mapping[float, Snapshot]) -> None:
        """From now on a target of NViT means its snapshot, and no other target is accepted."""
        self.snapshots = snapshots
        self.found.clear()

    def __call__(self, recipe: Recipe) -> ModelShape:
        """BadInput for a target of NViT that no snapshot is there for."""
        if recipe.structure is None:
            return self.dense
        step = str(recipe.structure.plain())
        if step not in self.found:
            self.found[step] = self._shape(recipe.structure)
        return self.found[step]

    def _shape(self, structure: Step) -> ModelShape:
        target = structure.params.get("target")
        if structure.method == "nvit" and target is not None and self.snapshots is not None:
            widths = Widths.from_plain(snapshot_of(self.snapshots, target).widths)
            return methods.model_shape(sliced_model(self.skeleton, widths))
        return Recipe(structure=structure).reshape(self.dense, self.skeleton)[0]
