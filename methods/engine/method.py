"""What a pruning method declares: name, paper, parameters, search space, presets and cost.

The search space, the command line, the tests and the tables read these declarations; methods are
listed in `engine.method_registry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.parameters import Counts, Parameter, check_values
from vitpareto.methods.engine.preparation import (
    PreparationOutcome,
    PreparationTrainer,
    SharedWeights,
    WidthsCost,
)
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.shape import ModelShape, model_shape

#: the depth and patch count that presets are published for; other models scale from there
PUBLISHED_DEPTH, PUBLISHED_PATCHES = 12, 196


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    year: int | None = None
    url: str = ""


@dataclass(frozen=True)
class Preset:
    """A published setting as relative choices, which `Method.resolve` makes absolute."""

    name: str
    choices: dict[str, Any]
    source: str = ""


class Method:
    """A published way to make a ViT cheaper: declarations plus a few functions.

    Attributes:
        name: what recipes and the command line call it.
        summary: one line for tables.
        kind: "tokens" acts inside the forward, "structure" changes the weights or the input.
        site: where a token method reduces: "mid-block" (after the attention residual) or
            "after-block" (after the MLP residual); elsewhere in words.
        training: "none", "calibration" (a few images, no gradients) or "required" (gradients).
        needs_preparation: one preparation (`prepare`) serves every setting.
        reads_calibration: the preparation uses labelled calibration images.
        reads_latency_table: costs may be read from a latency table of the model.
        is_reference: the unchanged model, whose recipe is empty; every trial is compared with it.
        resizes_input: makes the input images smaller and leaves the blocks unchanged.
        control: a baseline that every method is compared with.
        parameters: what a recipe holds, in absolute units.
        space: what a search chooses, relative to depth and patch count.
        presets: published settings.
        mixes: every token left is a mixture of many patches (`Trace.group` is then the largest).
        schedule: the parameters that `counts` may replace.
        identity: parameters that leave the model dense; None if there are none, with the reason in
            the docstring.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    kind: ClassVar[Literal["tokens", "structure"]] = "tokens"
    site: ClassVar[str] = "mid-block"
    training: ClassVar[Literal["none", "calibration", "required"]] = "none"
    needs_preparation: ClassVar[bool] = False
    reads_calibration: ClassVar[bool] = False
    reads_latency_table: ClassVar[bool] = False
    is_reference: ClassVar[bool] = False
    resizes_input: ClassVar[bool] = False
    control: ClassVar[bool] = False
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    space: ClassVar[tuple[Parameter, ...]] = ()
    presets: ClassVar[tuple[Preset, ...]] = ()
    mixes: ClassVar[bool] = False
    schedule: ClassVar[tuple[str, ...]] = ("keep_rate", "prune_layers", "r", "inflection")
    identity: ClassVar[dict[str, Any] | None] = None

    # -- settings ----------------------------------------------------------------------------

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        """Absolute parameters for a model of this shape, from relative search choices."""
        return dict(choices)

    def preset(self, preset: Preset, shape: ModelShape) -> dict[str, Any]:
        """A preset's parameters for a model of this shape."""
        return self.check(self.resolve(preset.choices, shape), shape)

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        """The parameters checked, with defaults filled in.

        Args:
            shape: check against these dimensions too.

        Raises:
            BadInput: for anything unknown, missing, out of range or impossible on this model.
        """
        counts = params.get("counts") is not None and any(
            isinstance(p, Counts) for p in self.parameters
        )
        optional = [p.name for p in self.parameters] if counts else ()
        checked = check_values(self.parameters, params, self.name, optional)
        if shape is not None:
            if counts:
                self._check_counts(checked["counts"], shape)
            self.check_shape(checked, shape)
        return checked

    def with_counts(self, params: dict[str, Any], counts: tuple[int, ...]) -> dict[str, Any] | None:
        """The same setting with another schedule, unchecked; None if the method takes no counts."""
        if not any(isinstance(p, Counts) for p in self.parameters):
            return None
        return {**{k: v for k, v in params.items() if k not in self.schedule}, "counts": counts}

    def _check_counts(self, counts: tuple[int, ...], shape: ModelShape) -> None:
        if len(counts) != shape.depth:
            raise BadInput(
                f"{self.name}.counts must have one entry per block, {shape.depth} "
                f"(got {len(counts)})",
                Code.MISMATCH,
                name="counts",
                where=self.name,
                got=len(counts),
                expected=shape.depth,
            )
        if counts[0] > shape.patches:
            raise BadInput(
                f"{self.name}.counts must be at most the model's {shape.patches} patches "
                f"(got {counts[0]})",
                Code.OUT_OF_RANGE,
                name="counts",
                where=self.name,
                got=counts[0],
                accepted=shape.patches,
            )

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        """Raises BadInput if the setting is impossible on this model. Default: calls `counts`."""
        self.counts(params, shape)

    # -- cost --------------------------------------------------------------------------------

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...] | None:
        """Patches left after each block; None if images decide (adaptive, or not calibrated)."""
        return shape.dense_counts()

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
