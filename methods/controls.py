"""The controls every method is reported against: dense, random, centre and resize.

Published by nobody, because they are what an engineer would try first. A method that does not beat
them at a budget has not earned its place there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.method import Method, Preset, register
from vitpareto.methods.engine.parameters import Float, Int
from vitpareto.methods.engine.shape import ModelShape, model_shape
from vitpareto.methods.engine.staged import StagedMethod, StagedReduction, staged_presets
from vitpareto.methods.engine.tokens import Tokens
from vitpareto.methods.engine.vit import Attended, Reduction, reduced

#: a prime below 2**31: products of two residues stay inside int64
_PRIME = 2147483629


@register
class Dense(Method):
    """The model as it is. Always trial 0; it is the identity, so it needs no identity setting."""

    name = "dense"
    summary = "the model as it is"
    control = True
    identity = {}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        return Reduction()


def _scatter(value: Tensor) -> Tensor:
    """Residues mod _PRIME -> well-mixed residues (three rounds of x -> x² + ax + b)."""
    for a, b in ((1103515245, 12345), (69069, 362437), (1664525, 1013904223)):
        value = (value * value % _PRIME + value * a % _PRIME + b) % _PRIME
    return value


class RandomReduction(StagedReduction):
    """Scores are a hash of (image, block, patch position): exact integers, no generator, so that
    an image's draw depends neither on its batch nor on the machine, and exports.
    """

    def __init__(self, counts: tuple[int, ...], seed: int):
        super().__init__(counts)
        self.seed = seed

    def begin(self, images: Tensor, tokens: Tokens) -> Tokens:
        # every few pixels as small integers: enough to tell images apart, the same in every float
        # type that holds the image exactly
        flat = images.flatten(1)
        pixels = (flat[:, :: max(1, flat.shape[1] // 4096)].float() * 32).round().to(torch.int64)
        place = torch.arange(pixels.shape[1], device=pixels.device)
        seed = (pixels * (place % 8191 + 1)).sum(dim=1).remainder(_PRIME)
        state = {**tokens.per_image, "seed": _scatter((seed + self.seed) % _PRIME)}
        return replace(tokens, per_image=state)

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        place = torch.arange(tokens.patches, device=tokens.x.device) + 1 + 4096 * block
        return _scatter((tokens.per_image["seed"][:, None] + place * 40503) % _PRIME)


@register
class Random(StagedMethod):
    """TopK's schedule with a random score: what the schedule alone is worth."""

    name = "random"
    summary = "drop patches at random, on TopK's schedule"
    control = True
    parameters = (
        *StagedMethod.parameters,
        Int("seed", "of the draw", default=0, low=0, high=2**30),
    )
    presets = staged_presets("TopK's schedule")

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> RandomReduction:
        return RandomReduction(self.counts(params, shape), params["seed"])


class CentreReduction(StagedReduction):
    """Keeps the patches nearest to the image's centre: the same ones in every image."""

    def __init__(self, counts: tuple[int, ...], grid: tuple[int, int]):
        super().__init__(counts)
        rows, columns = grid
        y = (torch.arange(rows) - (rows - 1) / 2).abs() / rows
        x = (torch.arange(columns) - (columns - 1) / 2).abs() / columns
        far = torch.maximum(y[:, None], x[None, :]) + 1e-3 * (y[:, None] + x[None, :])
        # a rank, not a distance: no ties, the upper left of equals first
        order = far.flatten().argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        self.register_buffer("nearness", -rank, persistent=False)

    def begin(self, images: Tensor, tokens: Tokens) -> Tokens:
        score = cast(Tensor, self.nearness).expand(tokens.x.shape[0], -1)
        return replace(tokens, per_patch={**tokens.per_patch, "nearness": score})

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        return tokens.per_patch["nearness"]


@register
class Centre(StagedMethod):
    """Keeps a fixed central block of patches, on TopK's schedule."""

    name = "centre"
    summary = "keep a fixed central block of patches, on TopK's schedule"
    control = True
    presets = staged_presets("TopK's schedule")

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> CentreReduction:
        return CentreReduction(self.counts(params, shape), shape.grid)


@register
class Resize(Method):
    """The dense model at a smaller input: an antialiased bicubic resize inside the model, position
    embeddings interpolated by timm. The cheapest trick there is, and a strong one. Its identity is
    the model's own height, so no constant of the class.
    """

    name = "resize"
    summary = "the dense model at a smaller input resolution"
    kind = "structure"
    site = "before the model"
    control = True
    parameters = (
        Int("size", "input height in pixels, a multiple of the patch's", low=1, high=4096),
    )
    space = (Float("scale", "input side, as a fraction of the model's own", low=0.4, high=0.95),)
    presets = tuple(
        Preset(f"{round(100 * s)}% side", {"scale": s}) for s in (0.857, 0.714)
    )  # 192 and 160 of 224

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        # on a coarse grid a scale near 1 would round to the dense model itself
        rows = min(round(choices["scale"] * shape.grid[0]), shape.grid[0] - 1)
        rows = max(1, rows)
        return {"size": rows * shape.patch[0]}

    def target(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, int]:
        """(height, width) in pixels: the width keeps the aspect ratio, in whole patches."""
        rows = params["size"] // shape.patch[0]
        columns = max(1, round(rows * shape.grid[1] / shape.grid[0]))
        return params["size"], columns * shape.patch[1]

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        if params["size"] % shape.patch[0] or params["size"] > shape.image[0]:
            raise BadInput(
                f"resize.size is {params['size']}: accepted is a multiple of the patch height "
                f"{shape.patch[0]} up to the model's own {shape.image[0]}"
            )

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        small, shape = reduced(model, None), model_shape(model)
        if params["size"] == shape.image[0]:
            return small
        size = self.target(params, shape)
        small.set_input_size(img_size=size)
        small.resize_to = size
        return small
