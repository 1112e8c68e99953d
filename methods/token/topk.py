"""TopK: keeps the patches with the highest class attention, without training, as defined by TRAM's
published comparison (the "TopK" rows of the table in its README).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.method_declaration import Paper
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.schedules import pruned_blocks
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import StagedMethod, StagedReduction, staged_presets
from vitpareto.methods.engine.tokens import Tokens


class TopKReduction(StagedReduction):
    """Score: the maximum of the class attention over heads."""

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        return attended.class_row()[..., tokens.prefix :].amax(dim=1)


@register
class TopK(StagedMethod):
    """Each prune layer keeps the `int(n * keep_rate)` patches with the highest `max_h a_j^h`."""

    name = "topk"
    summary = "keep the patches with the highest class attention (maximum over heads)"
    paper = Paper(
        "TopK pruning by class attention, as compared in TRAM", "as defined in TRAM's README"
    )
    presets = staged_presets("TRAM's table, TopK rows")

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        return sum(shape.row_macs(b, n) for b, n in pruned_blocks(counts, shape))

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> TopKReduction:
        return TopKReduction(self.counts(params, shape))
