"""What a pruning method declares: name, paper, parameters, search space, presets and cost.

The search space, the command line, the tests and the tables read these declarations; methods are
listed in `engine.registry`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.parameters import Counts, Parameter, check_values
from vitpareto.methods.engine.preparation import (
    PreparationOutcome,
    PreparationTrainer,
    SharedWeights,
    WidthsCost,
)
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.shape import ModelShape, model_shape

#: Presets are published for this depth and patch count and scale from there.
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
    """A published setting, as relative choices: `Method.resolve` makes it absolute."""

    name: str
    choices: dict[str, Any]
    source: str = ""


class Method:
    """One published way to make a ViT smaller. Subclasses are declarations plus a few functions."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    kind: ClassVar[Literal["tokens", "structure"]] = "tokens"
    site: ClassVar[str] = "mid-block"
    #: "none", "calibration" (a few images, no gradient) or "required" (gradient training)
    training: ClassVar[Literal["none", "calibration", "required"]] = "none"
    #: where training is required: one preparation serves every setting (`prepare`)
    trained_once: ClassVar[bool] = False
    #: the preparation uses labelled calibration images
    reads_calibration: ClassVar[bool] = False
    #: costs may be read from a latency table of the model
    reads_latency_table: ClassVar[bool] = False
    #: the model as it is: its recipe is the empty one, and every trial is compared with it
    is_reference: ClassVar[bool] = False
    #: makes the input images smaller and leaves the model's blocks as they are
    resizes_input: ClassVar[bool] = False
    #: a control is what every method must beat; it is never a finding by itself
    control: ClassVar[bool] = False
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    space: ClassVar[tuple[Parameter, ...]] = ()
    presets: ClassVar[tuple[Preset, ...]] = ()
    #: every token left is made of many patches, so that it may be the place of none (`Trace.group`)
    mixes: ClassVar[bool] = False
    #: parameters in whose place `counts` may be given, by the methods that take it
    schedule: ClassVar[tuple[str, ...]] = ("keep_rate", "prune_layers", "r", "inflection")
    #: parameters that leave the model dense; None where there are none, with the reason in the doc
    identity: ClassVar[dict[str, Any] | None] = None

    # -- settings ----------------------------------------------------------------------------

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        """Relative search choices -> absolute parameters for a model of this shape."""
        return dict(choices)

    def preset(self, preset: Preset, shape: ModelShape) -> dict[str, Any]:
        """A preset's parameters for a model of this shape."""
        return self.check(self.resolve(preset.choices, shape), shape)

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        """Parameters checked and completed; with `shape` also against the model's dimensions.

        Raises BadInput for anything unknown, missing, out of range or impossible on this model.
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
        """The same setting under another schedule, unchecked; None where a method takes none."""
        if not any(isinstance(p, Counts) for p in self.parameters):
            return None
        return {**{k: v for k, v in params.items() if k not in self.schedule}, "counts": counts}

    def _check_counts(self, counts: tuple[int, ...], shape: ModelShape) -> None:
        if len(counts) != shape.depth:
            raise BadInput(
                f"{self.name}.counts has {len(counts)} entries: the model has {shape.depth} blocks"
            )
        if counts[0] > shape.patches:
            raise BadInput(
                f"{self.name}.counts starts with {counts[0]} patches: the model has {shape.patches}"
            )

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        """BadInput where the setting is impossible on this model. Default: the schedule exists."""
        self.counts(params, shape)

    # -- cost --------------------------------------------------------------------------------

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...] | None:
        """Patches left after each block; None where images decide (adaptive, or not calibrated)."""
        return shape.dense_counts()

    def bounds(
        self, params: dict[str, Any], shape: ModelShape
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Fewest and most patches after each block, for settings whose `counts` is None."""
        counts = self.counts(params, shape)
        if counts is None:
            raise NotImplementedError(f"{self.name} must declare the bounds of its token counts")
        return counts, counts

    def entering(self, params: dict[str, Any], shape: ModelShape) -> int:
        """Patches that enter block 0; fewer than the model's where a method drops some of the
        embedded ones.
        """
        return shape.patches

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        """Whether these parameters leave the model dense. Default: no patch is ever dropped."""
        return self.counts(params, shape) == shape.dense_counts()

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """MACs an image of the method's own arithmetic under this schedule."""
        return 0

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        """What decides the result: settings with equal signatures are the same candidate."""
        return dict(params)

    # -- models ------------------------------------------------------------------------------

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        """The token step as a module (kind "tokens")."""
        raise NotImplementedError

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """The structural step (kind "structure") on `model`, which may be changed in place.

        weights: the state dict that will be loaded into the result, for steps whose dimensions it
        decides.
        """
        raise NotImplementedError

    def shaped_by_weights(self, params: dict[str, Any]) -> bool:
        """Whether a trained candidate's dimensions can only be read from its weights."""
        return False

    def calibrate(
        self, model: nn.Module, params: dict[str, Any], images: Iterable[Tensor]
    ) -> dict[str, Any]:
        """Parameters with what calibration found written in, so that no images are needed again."""
        return params

    def needs_calibration(self, params: dict[str, Any]) -> bool:
        return False

    # -- preparation (methods with `trained_once`) --------------------------------------------

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
        """Why no program of fixed shape is this model, and what to take instead; "": one is."""
        return ""
