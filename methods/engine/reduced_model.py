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

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.forward import (
    ReducedForward,
    ReducedVisionTransformer,
    ReducedVisionTransformerDistilled,
)
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.sliced_block import SlicedAttention, SlicedBlock

POOLS = ("token", "avg", "map")
#: what a block may be, each with the attention that it holds
_BLOCKS: dict[type, type] = {Block: Attention, SlicedBlock: SlicedAttention}
_REDUCED: dict[type, type] = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedVisionTransformerDistilled,
    ReducedVisionTransformer: ReducedVisionTransformer,
    ReducedVisionTransformerDistilled: ReducedVisionTransformerDistilled,
}


class UnsupportedModel(BadInput):
    """The model is not one whose tokens can be reduced correctly; the message says which part."""


def check_supported(model: nn.Module) -> None:
    """UnsupportedModel, naming the part and the reason, unless the reduced forward is exact for it.

    Types are compared exactly: a subclass may compute anything, and would be silently wrong.
    """

    def refuse(part: str, module: object, accepted: str) -> UnsupportedModel:
        kind = type(module)
        return UnsupportedModel(
            f"{type(model).__name__} cannot be pruned: its {part} is "
            f"{kind.__module__}.{kind.__name__}, accepted is {accepted}"
        )

    if type(model) not in _REDUCED:
        accepted = "timm's VisionTransformer or VisionTransformerDistilled itself"
        raise refuse("class", model, accepted)
    vit = cast(VisionTransformer, model)
    for index, block in enumerate(vit.blocks):
        if type(block) not in _BLOCKS:
            accepted = "timm.models.vision_transformer.Block, or vitpareto's SlicedBlock"
            raise refuse(f"block {index}", block, accepted)
        attention = _BLOCKS[type(block)]
        if type(block.attn) is not attention:
            accepted = f"{attention.__module__}.{attention.__name__}"
            raise refuse(f"attention in block {index}", block.attn, accepted)
    if not isinstance(vit.patch_drop, nn.Identity):
        raise refuse("patch_drop", vit.patch_drop, "none (patch_drop_rate=0)")
    if vit.global_pool not in POOLS:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be pruned: its pooling is {vit.global_pool!r}, "
            f"accepted is one of {', '.join(repr(p) for p in POOLS)}"
        )
    if vit.attn_pool is not None:
        if type(vit.attn_pool) is not AttentionPoolLatent:
            raise refuse("pooling", vit.attn_pool, "AttentionPoolLatent")
        if vit.attn_pool.pos_embed is not None:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be pruned: its pooling adds a position to every "
                "token slot, which has no meaning once tokens are gone"
            )


def reduced(model: nn.Module, reduction: Reduction | None, recipe: Any = None) -> ReducedForward:
    """A copy of `model` whose forward applies `reduction` (None: dense); `model` stays as is."""
    check_supported(model)
    out = copy.deepcopy(model)
    out.__class__ = _REDUCED[type(model)]
    made = cast(ReducedForward, out)
    if not hasattr(made, "resize_to"):
        made.resize_to = None
    made.reduction = reduction if reduction is not None else Reduction()
    made.reduction.train(model.training)
    made.recipe = recipe
    return made
