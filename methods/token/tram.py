"""TRAM (Marchetti, Traini, Ursino and Virgili, "Efficient token pruning in Vision Transformers
using an attention-based Multilayer Network", Expert Systems with Applications 279, 2025): a network
with the patches as nodes and a layer per block. The score of a patch is the attention that it
receives from other patches, each weighted by the attention that it receives itself, summed over the
blocks so far.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.method_declaration import Paper
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.schedules import pruned_blocks
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import StagedMethod, StagedReduction, staged_presets
from vitpareto.methods.engine.tokens import Tokens


def second_order_degree(peak: Tensor) -> Tensor:
    """`c_j = sum_i d_i M_ij` [B, n] with the in-degree `d_i = sum_k M_ki`, for M [B, n, n].

    In at least float32, because c is of the order of n, where half precision has few distinct
    values.
    """
    wide = torch.promote_types(peak.dtype, torch.float32)
    degree = peak.sum(dim=1, dtype=wide)
    return torch.bmm(degree[:, None], peak.to(wide))[:, 0]


class TramReduction(StagedReduction):
    """Score: `S_l = (l + 1) / L * c + S_(l-1)`, with M the maximum over heads of the attention
    among patches. It is computed up to the last prune layer.
    """

    def __init__(self, counts: tuple[int, ...], last: int):
        """counts: patches left after each block. last: the last block that reduces; -1 for none."""
        super().__init__(counts)
        self.last = last

    def needs_peak(self, block: int) -> bool:
        return block <= self.last

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Tensor | None:
        """S [B, n] including this block; None after the last prune layer."""
        if attended.peak is None:
            return None
        among = attended.peak[:, tokens.prefix :, tokens.prefix :]
        # autocast would compute the product in half precision
        with torch.autocast(among.device.type, enabled=False):
            share = second_order_degree(among) * ((block + 1) / len(self.counts))
        before = tokens.per_patch.get("degree")
        return share if before is None else share + before

    def reduce(self, block: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if seen is None:
            return tokens
        tokens = replace(tokens, per_patch={**tokens.per_patch, "degree": seen})
        if self.counts[block] >= tokens.patches:
            return tokens
        return super().reduce(block, tokens, seen)


@register
class Tram(StagedMethod):
    """Each prune layer keeps the `int(n * keep_rate)` patches with the highest S."""

    name = "tram"
    summary = "keep the patches that highly attended patches attend to, summed over blocks"
    paper = Paper(
        "Efficient token pruning in Vision Transformers using an attention-based Multilayer "
        "Network",
        "Marchetti, Traini, Ursino, Virgili",
        2025,
        "https://doi.org/10.1016/j.eswa.2025.127449",
    )
    presets = staged_presets("TRAM's table")

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """n² for c in every block up to the last prune layer."""
        before = (shape.patches, *counts[:-1])
        return sum(n * n for n in before[: self._last(counts, shape) + 1])

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> TramReduction:
        counts = self.counts(params, shape)
        return TramReduction(counts, self._last(counts, shape))

    def _last(self, counts: tuple[int, ...], shape: ModelShape) -> int:
        """The last block that reduces; -1 for none."""
        return max((block for block, _ in pruned_blocks(counts, shape)), default=-1)
