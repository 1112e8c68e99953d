"""Which timm models can be reduced, and the copy of one whose forward is the reduced one.

`reduced(model, reduction)` swaps the class of a copied model. Parameter names stay timm's; what a
method adds sits under `reduction.`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.forward import (
    ReducedForward,
    ReducedVisionTransformer,
    ReducedVisionTransformerDistilled,
)
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.sliced_block import SlicedAttention, SlicedBlock

#: accepted values of timm's global_pool
POOLS = ("token", "avg", "map")
#: accepted classes of blocks, each with the class of its attention
_BLOCKS: dict[type, type] = {Block: Attention, SlicedBlock: SlicedAttention}
#: accepted classes of models, each with the class of its reduced copy
_REDUCED: dict[type, type] = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
    ReducedVisionTransformer: ReducedVisionTransformer,
    ReducedVisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


class UnsupportedModel(BadInput):
    """The reduced forward is not exact for this model. `details["part"]` says which part."""

    def __init__(self, message: str, code: Code = Code.UNSUPPORTED, **details: Any) -> None:
        super().__init__(message, code, **details)


def check_supported(model: nn.Module) -> None:
    """Raises UnsupportedModel, with the part, unless the reduced forward is exact for the model.

    Types are compared exactly, because a subclass may compute anything.
    """

    def unsupported(part: str, got: object, accepted: str) -> UnsupportedModel:
        kind = got if isinstance(got, str) else f"{type(got).__module__}.{type(got).__name__}"
        return UnsupportedModel(
            f"{type(model).__name__} cannot be pruned: its {part} must be {accepted} (got {kind})",
            model=type(model).__name__,
            part=part,
            got=kind,
            accepted=accepted,
        )

    if type(model) not in _REDUCED:
        accepted = "timm's VisionTransformer or VisionTransformerDistilled, not a subclass"
        raise unsupported("class", model, accepted)
    vit = cast(VisionTransformer, model)
    for index, block in enumerate(vit.blocks):
        if type(block) not in _BLOCKS:
            accepted = "timm.models.vision_transformer.Block or vitpareto's SlicedBlock"
            raise unsupported(f"block {index}", block, accepted)
        attention = _BLOCKS[type(block)]
        if type(block.attn) is not attention:
            accepted = f"{attention.__module__}.{attention.__name__}"
            raise unsupported(f"attention in block {index}", block.attn, accepted)
    if not isinstance(vit.patch_drop, nn.Identity):
        raise unsupported("patch_drop", vit.patch_drop, "none (patch_drop_rate=0)")
    if vit.global_pool not in POOLS:
        accepted = f"one of {', '.join(repr(p) for p in POOLS)}"
        raise unsupported("pooling", repr(vit.global_pool), accepted)
    if vit.attn_pool is not None:
        if type(vit.attn_pool) is not AttentionPoolLatent:
            raise unsupported("pooling", vit.attn_pool, "AttentionPoolLatent")
        if vit.attn_pool.pos_embed is not None:
            # it adds a position to every token slot, which has no meaning once tokens are gone
            accepted = "without position embeddings"
            raise unsupported("pooling", "AttentionPoolLatent with position embeddings", accepted)


def reduced(model: nn.Module, reduction: Reduction | None, recipe: Any = None) -> ReducedForward:
    """A copy of `model` whose forward applies `reduction` (None: dense). `model` is not changed."""
    check_supported(model)
    out = copy.deepcopy(model)
    out.__class__ = _REDUCED[type(model)]
    result = cast(ReducedForward, out)
    if not hasattr(result, "resize_to"):
        result.resize_to = None
    result.reduction = reduction if reduction is not None else Reduction()
    result.reduction.train(model.training)
    result.recipe = recipe
    return result
