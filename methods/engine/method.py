"""What a pruning method does: its cost, the model that it builds and its preparation.

Methods are listed in `engine.method_registry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from vitpareto.methods.engine.method_declaration import MethodDeclaration
from vitpareto.methods.engine.preparation import (
    PreparationOutcome,
    PreparationTrainer,
    SharedWeights,
    WidthsCost,
)
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.shape import ModelShape, model_shape


class Method(MethodDeclaration):
    """A published way to make a ViT cheaper: a declaration, costs and the model that it builds.

    A token method overrides `reduction`, a structural method `restructure`. One instance serves all
    models and settings and has no state. All params are checked ones (`check`), and shapes are
    those of the model that the step acts on.
    """

    # -- cost --------------------------------------------------------------------------------

    def bounds(
        self, params: dict[str, Any], shape: ModelShape
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(fewest, most) patches after each block, for settings whose `counts` is None."""
        counts = self.counts(params, shape)
        if counts is None:
            raise NotImplementedError(f"{self.name} must declare the bounds of its token counts")
        return counts, counts

    def entering(self, params: dict[str, Any], shape: ModelShape) -> int:
        """Patches that enter block 0; fewer than the model's if embedded patches are dropped."""
        return shape.patches

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        """Whether these parameters leave the model dense. Default: no patch is ever dropped."""
        return self.counts(params, shape) == shape.dense_counts()

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """MACs per image of the method's own arithmetic with this schedule, as fvcore counts."""
        return 0

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        """What decides the result: settings with equal signatures are one candidate."""
        return dict(params)

    # -- models ------------------------------------------------------------------------------

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        """The token step as a module (kind "tokens" only)."""
        raise NotImplementedError

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """The structural step (kind "structure" only).

        Args:
            model: a copy that may be changed in place.
            weights: the state dict that will be loaded into the result, for steps that read their
                dimensions from it.
        """
        raise NotImplementedError

    def shaped_by_weights(self, params: dict[str, Any]) -> bool:
        """Whether the dimensions of a trained candidate can only be read from its weights."""
        return False

    def calibrate(
        self, model: nn.Module, params: dict[str, Any], images: Iterable[Tensor]
    ) -> dict[str, Any]:
        """The parameters with the outcome of calibration, so that no images are needed again.

        Args:
            model: the dense model after the structural step, as a reduced model.
            images: batches of normalised images [B, 3, H, W].
        """
        return params

    def needs_calibration(self, params: dict[str, Any]) -> bool:
        """Whether `build` must calibrate these parameters first."""
        return False

    # -- preparation (methods with `needs_preparation`) --------------------------------------------

    def preparation_plan(
        self, model: nn.Module, searched: Mapping[str, Any], cost: WidthsCost | None
    ) -> dict[str, Any]:
        """What the preparation depends on besides the model, the images and the training settings.

        Args:
            model: the model that the step acts on.
            searched: the search's parameters of this method by name: a `Parameter` with the
                study's bounds, or the value that the study fixes.
            cost: as `PreparationTrainer.cost`.

        Returns:
            JSON values. They are part of the key under which the outcome is found again.
        """
        return {}

    def prepare(self, plan: Mapping[str, Any], trainer: PreparationTrainer) -> PreparationOutcome:
        """Train what every setting of the search needs.

        Default: one training of the first preset, whose weights serve every setting.
        """
        shape = model_shape(trainer.model)
        trained = trainer.fit(self.preset(self.presets[0], shape))
        return SharedWeights(trainer.save_weights(trained.state), trained.loss)

    def preparation_outcome(self, data: Mapping[str, Any]) -> PreparationOutcome:
        """The outcome of `prepare` from its JSON values."""
        return SharedWeights.from_json(data)

    def refuses_export(self, params: dict[str, Any], shape: ModelShape) -> str:
        """Why the model cannot be exported with fixed shapes, and the alternative; "" if it can."""
        return ""
