"""A fixed central block of patches on TopK's schedule: the same patches in every image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import StagedMethod, StagedReduction, staged_presets
from vitpareto.methods.engine.tokens import Tokens


class CentreReduction(StagedReduction):
    """Keeps the patches nearest to the image's centre, the same ones in every image.

    counts: patches left after each block. grid: patches (rows, columns).
    """

    def __init__(self, counts: tuple[int, ...], grid: tuple[int, int]):
        super().__init__(counts)
        rows, columns = grid
        y = (torch.arange(rows) - (rows - 1) / 2).abs() / rows
        x = (torch.arange(columns) - (columns - 1) / 2).abs() / columns
        far = torch.maximum(y[:, None], x[None, :]) + 1e-3 * (y[:, None] + x[None, :])
        # ranks instead of distances have no ties; of equal distances the upper left comes first
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
