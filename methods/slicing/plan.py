"""Which widths to prune a model to: cost as a function of widths, and even shrinking.

Pure functions on `Widths`: no model runs here and no weight changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from typing import cast

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.shape import block_shape, model_shape, norm_cost
from vitpareto.methods.slicing.sliced_model import sliced_model
from vitpareto.methods.slicing.widths import (
    INTO_HIDDEN,
    PARTS,
    BlockWidths,
    Widths,
    model_widths,
    unshapable,
)

#: the cost of a model with these widths in any unit: MACs per image, or ms from a latency table
Cost = Callable[[Widths], float]

#: NViT's groups, how many are removed at a time: heads, channels per head, hidden and embedding
#: channels
GROUPS = {"heads": 2, "qk": 8, "v": 8, "mlp": 16, "embedding": 16}
#: how far below its target a plan may end, as a fraction, before a smaller group is preferred
SLACK = 0.01


def macs_cost(model: nn.Module) -> Cost:
    """MACs per image of `model` with any widths and all tokens, in closed form.

    Equal to those of `model_shape(sliced_model(model, widths))`, in a few microseconds.
    """
    # a copy of the shapes on the meta device, without a copy of the weights
    tensors = [*model.parameters(), *model.buffers()]
    meta = copy.deepcopy(model, {id(t): t.detach().to("meta") for t in tensors})
    shape, own = model_shape(meta), model_widths(meta)
    n = shape.patches + shape.prefix
    per_block = [
        _block_macs(cast(Block, block), n) for block in cast(VisionTransformer, meta).blocks
    ]

    def around(widths: Widths) -> int:
        """MACs of everything but the blocks."""
        made = model_shape(sliced_model(meta, widths))
        blocks = sum(block.macs(n, n) for block in made.blocks)
        return made.macs(made.dense_counts(), "mid-block") - blocks

    # linear in the embedding, if that can change
    fixed_part, slope = around(own), 0
    if "embedding" not in unshapable(meta):
        slope = around(replace(own, embedding=own.embedding + 1)) - fixed_part

    def cost(widths: Widths) -> float:
        e = widths.embedding
        total = fixed_part + slope * (e - own.embedding)
        return total + sum(f(e, b) for f, b in zip(per_block, widths.blocks, strict=True))

    return cost


def _block_macs(block: Block, n: int) -> Callable[[int, BlockWidths], int]:
    """A function of the embedding and a block's widths: the block's MACs with n tokens."""
    attn = cast(Attention, block.attn)
    gated = 0 if attn.gate is None else 1
    in_q, in_out = norm_cost(attn.q_norm) + norm_cost(attn.k_norm), norm_cost(attn.norm)
    norms = norm_cost(block.norm1) + norm_cost(block.norm2)
    into, inner = len(INTO_HIDDEN.get(type(block.mlp), ())), 0
    if into:
        inner = norm_cost(cast(nn.Module, block.mlp.norm))
    # the cost of an MLP whose width cannot change
    other = block_shape(block).mlp - norm_cost(block.norm2) * attn.qkv.in_features

    @cache
    def macs(e: int, w: BlockWidths) -> int:
        qk, v = w.heads * w.qk, w.heads * w.v
        a_token = e * (2 * qk + (2 + gated) * v) + in_q * qk + in_out * v + norms * e
        a_token += e * w.mlp * (into + 1) + inner * w.mlp if into else other
        return n * a_token + n * n * (qk + v)

    return macs


def least(widths: Widths, fixed: Collection[str] = ()) -> Widths:
    """The smallest widths that the removal of whole groups can reach: of each dimension one group,
    plus what is left if the width is not a multiple of the group. fixed: widths that do not change.
    """

    def low(part: str, width: int) -> int:
        group = GROUPS[part]
        return width if part in fixed or width < group else group + width % group

    blocks = (
        BlockWidths(**{part: low(part, getattr(b, part)) for part in PARTS}) for b in widths.blocks
    )
    return Widths(low("embedding", widths.embedding), tuple(blocks))


def check_reachable(cost: Cost, widths: Widths, target: float, fixed: Collection[str] = ()) -> None:
    """Raises BadInput, with the least cost that whole groups allow, if the target is below it."""
    floor = cost(least(widths, fixed))
    if target < floor:
        whole = cost(widths)
        groups = ", ".join(f"{size} {part}" for part, size in GROUPS.items())
        uncut = f"; {', '.join(sorted(fixed))} cannot be cut in this model" if fixed else ""
        raise BadInput(
            f"the target must be at least {floor / whole:.4g}, the cost at the minimum "
            f"widths (got {target / whole:.4g}; groups: {groups}{uncut})",
            Code.OUT_OF_RANGE,
            name="target",
            got=target / whole,
            accepted=floor / whole,
            fixed=sorted(fixed),
        )


def even(widths: Widths, cost: Cost, target: float, fixed: Collection[str] = ()) -> Widths:
    """The largest widths that cost at most `target`, with embedding, attention and MLP scaled by
    the same factor and rounded to whole groups. Without scores, a target means these widths.

    Attention loses heads first, and width per head if heads cannot shrink as far.

    Args:
        widths: the model's own.
        cost: of given widths, in any unit.
        target: in cost's unit.
        fixed: names of widths that do not change.

    Raises BadInput if the least widths cost more than the target.
    """
    check_reachable(cost, widths, target, fixed)
    floor = least(widths, fixed)

    def shrunk(part: str, own: int, low: int, factor: float) -> int:
        removed = round((own - own * factor) / GROUPS[part])
        return max(low, own - removed * GROUPS[part]) if part not in fixed else own

    def scaled(factor: float) -> Widths:
        blocks = []
        for own, low in zip(widths.blocks, floor.blocks, strict=True):
            heads = shrunk("heads", own.heads, low.heads, factor)
            rest = min(1.0, factor * own.heads / heads)
            qk, v = shrunk("qk", own.qk, low.qk, rest), shrunk("v", own.v, low.v, rest)
            blocks.append(BlockWidths(heads, qk, v, shrunk("mlp", own.mlp, low.mlp, factor)))
        embedding = shrunk("embedding", widths.embedding, floor.embedding, factor)
        return Widths(embedding, tuple(blocks))

    # cost is a step function of the factor; no two steps are closer than this
    steps = 2 * max(widths.embedding, *(max(b.mlp, b.heads * b.qk) for b in widths.blocks))
    factors = (i / steps for i in range(steps, -1, -1))
    return next((w for w in map(scaled, factors) if cost(w) <= target), floor)
