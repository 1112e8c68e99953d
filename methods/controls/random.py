"""Random dropping on TopK's schedule: shows what the schedule achieves without a score."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Int
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import StagedMethod, StagedReduction, staged_presets
from vitpareto.methods.engine.tokens import Tokens

#: a prime below 2**31, so that products of two residues fit into int64
_PRIME = 2147483629


def _scatter(value: Tensor) -> Tensor:
    """A hash of residues mod _PRIME: three rounds of x -> x² + ax + b."""
    for a, b in ((1103515245, 12345), (69069, 362437), (1664525, 1013904223)):
        value = (value * value % _PRIME + value * a % _PRIME + b) % _PRIME
    return value


class RandomReduction(StagedReduction):
    """Scores are a hash of (image, block, patch position) in exact integers.

    Unlike a random generator, a hash exports, and depends neither on the batch nor on the machine.
    """

    def __init__(self, counts: tuple[int, ...], seed: int):
        super().__init__(counts)
        self.seed = seed

    def begin(self, images: Tensor, tokens: Tokens) -> Tokens:
        # about 4,096 pixels as small integers distinguish images, equally in every float type that
        # holds the image exactly
        flat = images.flatten(1)
        pixels = (flat[:, :: max(1, flat.shape[1] // 4096)].float() * 32).round().to(torch.int64)
        position = torch.arange(pixels.shape[1], device=pixels.device)
        seed = (pixels * (position % 8191 + 1)).sum(dim=1).remainder(_PRIME)
        state = {**tokens.per_image, "seed": _scatter((seed + self.seed) % _PRIME)}
        return replace(tokens, per_image=state)

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        position = torch.arange(tokens.patches, device=tokens.x.device) + 1 + 4096 * block
        return _scatter((tokens.per_image["seed"][:, None] + position * 40503) % _PRIME)


@register
class Random(StagedMethod):
    """TopK's schedule with a random score."""

    name = "random"
    summary = "drop patches at random, on TopK's schedule"
    control = True
    parameters = (
        *StagedMethod.parameters,
        Int("seed", "seed of the random scores", default=0, low=0, high=2**30),
    )
    presets = staged_presets("TopK's schedule")

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> RandomReduction:
        return RandomReduction(self.counts(params, shape), params["seed"])
