"""Made-up methods of every kind, as a user would add them: one file, put into `methods/token`.

`tests/search/trials/test_made_up_methods.py` copies this file into a copy of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float
from vitpareto.methods.engine.preparation import (
    PreparationOutcome,
    PreparationTrainer,
    WidthsCost,
)
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.shape import ModelShape, model_shape
from vitpareto.methods.engine.staged import StagedMethod, StagedReduction, staged_presets
from vitpareto.methods.engine.tokens import Tokens, gather, keep, top_k
from vitpareto.methods.slicing.importance import magnitudes, top
from vitpareto.methods.slicing.sliced_model import slice_model, sliced_model
from vitpareto.methods.slicing.widths import Widths, model_widths, widths_of

LEVELS = (0.5, 0.75)


class LastReduction(StagedReduction):
    """The later a patch, the higher its score."""

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        position = torch.arange(tokens.patches, device=tokens.x.device, dtype=tokens.x.dtype)
        return position.expand(tokens.x.shape[0], -1)


@register
class Last(StagedMethod):
    """A token method without training."""

    name = "made-up-last"
    summary = "keep the last patches"
    presets = staged_presets("nobody")

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        return LastReduction(self.counts(params, shape))


@register
class Calibrated(StagedMethod):
    """A token method without training whose counts come from calibration images."""

    name = "made-up-calibrated"
    summary = "keep the last patches, fewer of them for brighter calibration images"
    training = "calibration"
    presets = staged_presets("nobody")

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...] | None:  # type: ignore[override]
        return params.get("counts")

    def bounds(
        self, params: dict[str, Any], shape: ModelShape
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        most = super().counts({**params, "counts": None}, shape)
        known = params.get("counts")
        return known or (1,) * shape.depth, known or most

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return dict(params)

    def needs_calibration(self, params: dict[str, Any]) -> bool:
        return params.get("counts") is None

    def calibrate(
        self, model: nn.Module, params: dict[str, Any], images: Iterable[Tensor]
    ) -> dict[str, Any]:
        bright = torch.stack([batch.mean() for batch in images]).mean().sigmoid()
        most = super().counts(params, model_shape(model))
        fewer = tuple(max(1, int(n * (1 - 0.1 * float(bright)))) for n in most)
        return {"counts": fewer}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        return LastReduction(params["counts"])


class GateReduction(Reduction):
    """One linear head scores the patches at every layer; a sigmoid of the score scales them."""

    site = "after-block"

    def __init__(self, dim: int, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.counts = counts
        self.head = nn.Linear(dim, 1)

    def reduce(self, block: int, tokens: Tokens, seen: None) -> Tokens:
        count = self.counts[block]
        if count >= tokens.patches:
            return tokens
        score = self.head(tokens.x[:, tokens.prefix :]).squeeze(-1)
        index = top_k(score, count)
        kept = keep(tokens, index)
        gate = 2 * gather(score.unsqueeze(-1), index).sigmoid().to(kept.x.dtype)
        prefix, patches = kept.x[:, : kept.prefix], kept.x[:, kept.prefix :]
        return replace(kept, x=torch.cat([prefix, patches * gate], dim=1))


@register
class Gate(StagedMethod):
    """A token method that is trained in every trial."""

    name = "made-up-gate"
    summary = "keep the patches that a head trained in the trial scores highest"
    site = "after-block"
    training = "required"
    presets = staged_presets("nobody")

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        return GateReduction(shape.dim, self.counts(params, shape))


@register
class SharedGate(Gate):
    """A token method that is trained once for all settings: the head is the same for all."""

    name = "made-up-shared-gate"
    summary = "keep the patches that a head trained once scores highest"
    needs_preparation = True


def narrower(model: nn.Module, level: float) -> Widths:
    """The model's widths with a fraction of the hidden units, in whole 16s."""
    widths = model_widths(model)
    blocks = (replace(b, mlp=max(16, 16 * round(b.mlp * level / 16))) for b in widths.blocks)
    return Widths(widths.embedding, tuple(blocks))


@register
class Thin(Method):
    """A structural method without training."""

    name = "made-up-thin"
    summary = "keep a fraction of the hidden units, by magnitude"
    kind = "structure"
    site = "the weights"
    parameters = (Float("level", "fraction of the hidden units", low=0.25, high=1.0),)
    space = (Float("level", "fraction of the hidden units", low=0.5, high=0.75),)
    presets = (Preset("half", {"level": 0.5}),)

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {"level": min(LEVELS, key=lambda level: abs(level - choices["level"]))}

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        return False

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        widths = narrower(model, params["level"]) if weights is None else widths_of(weights)
        if weights is not None or next(model.parameters()).is_meta:
            return sliced_model(model, widths)
        return slice_model(model, top(magnitudes(model), widths))


@register
class TrainedThin(Thin):
    """A structural method that is trained in every trial."""

    name = "made-up-trained-thin"
    summary = "keep a fraction of the hidden units, and train the others in the trial"
    training = "required"


@dataclass(frozen=True)
class LevelWeights(PreparationOutcome):
    """A digest for every level."""

    levels: dict[str, str]

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self.levels.values())

    def weights_for(self, params: Mapping[str, Any]) -> str:
        return self.levels[str(params["level"])]

    def to_json(self) -> dict[str, Any]:
        return {"levels": self.levels}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LevelWeights:
        return cls(dict(data["levels"]))


@register
class TunedThin(Thin):
    """A structural method whose levels are prepared, each with a few updates."""

    name = "made-up-tuned-thin"
    summary = "keep a fraction of the hidden units, and train the others"
    training = "required"
    needs_preparation = True

    def preparation_plan(
        self, model: nn.Module, searched: Mapping[str, Any], cost: WidthsCost | None
    ) -> dict[str, Any]:
        return {"levels": list(LEVELS)}

    def prepare(self, plan: Mapping[str, Any], trainer: PreparationTrainer) -> LevelWeights:
        found = {}
        for index, level in enumerate(plan["levels"]):
            model = self.restructure(copy.deepcopy(trainer.model), {"level": level})
            trainer.update(model, index, steps=2)
            found[str(level)] = trainer.save_weights(model.state_dict())
            trainer.report(f"level {level}")
        return LevelWeights(found)

    def preparation_outcome(self, data: Mapping[str, Any]) -> LevelWeights:
        return LevelWeights.from_json(data)
