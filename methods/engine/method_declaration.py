"""What a pruning method declares: name, paper, parameters, search space, presets and schedule.

The search space, the command line, the tests and the tables read these declarations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.parameters import Counts, Parameter, check_values
from vitpareto.methods.engine.shape import ModelShape

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


class MethodDeclaration:
    """What a method is called, what it accepts and what a search may choose.

    Subclasses set the attributes, and override the functions whose defaults do not fit.

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

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...] | None:
        """Patches left after each block; None if images decide (adaptive, or not calibrated)."""
        return shape.dense_counts()
