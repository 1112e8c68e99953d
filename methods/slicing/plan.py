"""Which widths to prune a model to: cost as a function of widths, and NViT's greedy removal.

Pure functions on `Widths` and `Scores`: no model runs here and no weight is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from typing import cast

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.shape import block_shape, model_shape, norm_cost
from vitpareto.methods.slicing.importance import BlockScores, Scores
from vitpareto.methods.slicing.sliced_model import sliced_model
from vitpareto.methods.slicing.widths import (
    INTO_HIDDEN,
    PARTS,
    BlockWidths,
    Widths,
    model_widths,
    unshapable,
)

#: what a model of these widths costs, in any unit: MACs an image, or milliseconds from a table
Cost = Callable[[Widths], float]

#: what is removed at once (NViT's groups): heads; channels per head; hidden and embedding channels
GROUPS = {"heads": 2, "qk": 8, "v": 8, "mlp": 16, "embedding": 16}
#: how far below its target a plan may end, as a fraction, before smaller groups are tried instead
SLACK = 0.01


def macs_cost(model: nn.Module) -> Cost:
    """The MACs of one image through `model` in any widths, all tokens kept, in closed form: equal
    to `model_shape(sliced_model(model, widths))`'s, at a few microseconds.
    """
    # a copy of shapes: the weights are left where they are
    tensors = [*model.parameters(), *model.buffers()]
    meta = copy.deepcopy(model, {id(t): t.detach().to("meta") for t in tensors})
    shape, own = model_shape(meta), model_widths(meta)
    n = shape.patches + shape.prefix
    per_block = [
        _block_macs(cast(Block, block), n) for block in cast(VisionTransformer, meta).blocks
    ]

    def around(widths: Widths) -> int:
        """Everything but the blocks."""
        made = model_shape(sliced_model(meta, widths))
        blocks = sum(block.macs(n, n) for block in made.blocks)
        return made.macs(made.dense_counts(), "mid-block") - blocks

    # linear in the embedding, where that can change at all
    fixed_part, slope = around(own), 0
    if "embedding" not in unshapable(meta):
        slope = around(replace(own, embedding=own.embedding + 1)) - fixed_part

    def cost(widths: Widths) -> float:
        e = widths.embedding
        total = fixed_part + slope * (e - own.embedding)
        return total + sum(f(e, b) for f, b in zip(per_block, widths.blocks, strict=True))

    return cost


def _block_macs(block: Block, n: int) -> Callable[[int, BlockWidths], int]:
    """A block's MACs with n tokens, given the embedding and its widths."""
    attn = cast(Attention, block.attn)
    gated = 0 if attn.gate is None else 1
    in_q, in_out = norm_cost(attn.q_norm) + norm_cost(attn.k_norm), norm_cost(attn.norm)
    norms = norm_cost(block.norm1) + norm_cost(block.norm2)
    into, inner = len(INTO_HIDDEN.get(type(block.mlp), ())), 0
    if into:
        inner = norm_cost(cast(nn.Module, block.mlp.norm))
    # an MLP that has no other width costs what it costs
    other = block_shape(block).mlp - norm_cost(block.norm2) * attn.qkv.in_features

    @cache
    def macs(e: int, w: BlockWidths) -> int:
        qk, v = w.heads * w.qk, w.heads * w.v
        a_token = e * (2 * qk + (2 + gated) * v) + in_q * qk + in_out * v + norms * e
        a_token += e * w.mlp * (into + 1) + inner * w.mlp if into else other
        return n * a_token + n * n * (qk + v)

    return macs


def least(widths: Widths, fixed: Collection[str] = ()) -> Widths:
    """The narrowest widths that removing whole groups leads to: one group of everything, or what
    is left over beside it. `fixed`: dimensions that stay as they are.
    """

    def low(part: str, width: int) -> int:
        group = GROUPS[part]
        return width if part in fixed or width < group else group + width % group

    blocks = (
        BlockWidths(**{part: low(part, getattr(b, part)) for part in PARTS}) for b in widths.blocks
    )
    return Widths(low("embedding", widths.embedding), tuple(blocks))


def plan(
    scores: Scores,
    widths: Widths,
    cost: Cost,
    target: float,
    *,
    eta: float,
    fixed: Collection[str] = (),
) -> Widths:
    """The widths left once the globally least important groups are gone and `cost` is at most
    `target` (in cost's unit).

    One group after another, that of the lowest `importance - eta * saved cost` of all blocks and
    dimensions (arXiv:2110.04869, section 3.2), with importances as multiples of a group's mean and
    saved costs too, so that `eta` is a plain number: which part of what a group matters on average
    it is worth that one more group's cost goes. What stays are the units that
    `importance.top(scores, …)` names. BadInput where the least widths cost more than the target.
    """
    check_reachable(cost, widths, target, fixed)
    greedy = _Greedy(scores, widths, cost, eta, fixed)
    while greedy.cost > target:
        greedy.remove(target)
    return greedy.widths


def check_reachable(cost: Cost, widths: Widths, target: float, fixed: Collection[str] = ()) -> None:
    """BadInput, naming the least cost that whole groups allow, where the target is below it."""
    floor = cost(least(widths, fixed))
    if target < floor:
        whole = cost(widths)
        kept = f"; {', '.join(sorted(fixed))} cannot be cut in this model" if fixed else ""
        raise BadInput(
            f"nvit cannot reach a target of {target / whole:.4g}: with one group of everything "
            f"left the cost is {floor / whole:.4g} of the model's (groups: {_said(GROUPS)}{kept})"
        )


def _said(groups: dict[str, int]) -> str:
    return ", ".join(f"{size} {part}" for part, size in groups.items())


def even(widths: Widths, cost: Cost, target: float, fixed: Collection[str] = ()) -> Widths:
    """The largest widths of at most `target` that shrink embedding, attention and MLP in the same
    proportion, in whole groups: what a target means where nothing was scored.

    Attention gives up heads first, and width per head where they cannot follow. BadInput where the
    least widths cost more.
    """
    check_reachable(cost, widths, target, fixed)
    floor = least(widths, fixed)

    def near(part: str, own: int, low: int, share: float) -> int:
        gone = round((own - own * share) / GROUPS[part])
        return max(low, own - gone * GROUPS[part]) if part not in fixed else own

    def at(share: float) -> Widths:
        blocks = []
        for own, low in zip(widths.blocks, floor.blocks, strict=True):
            heads = near("heads", own.heads, low.heads, share)
            rest = min(1.0, share * own.heads / heads)
            qk, v = near("qk", own.qk, low.qk, rest), near("v", own.v, low.v, rest)
            blocks.append(BlockWidths(heads, qk, v, near("mlp", own.mlp, low.mlp, share)))
        embedding = near("embedding", widths.embedding, floor.embedding, share)
        return Widths(embedding, tuple(blocks))

    # cost rises with the share in steps, of which no two are closer than this
    steps = 2 * max(widths.embedding, *(max(b.mlp, b.heads * b.qk) for b in widths.blocks))
    shares = (i / steps for i in range(steps, -1, -1))
    return next((w for w in map(at, shares) if cost(w) <= target), floor)


#: a dimension: its name, and its block (of the embedding, -1)
_Key = tuple[str, int]


def _grouped(scores: Tensor, size: int) -> Tensor:
    """Sums over groups of `size`, the lowest together: [..., width] -> [..., width // size]."""
    ranked = scores.sort(dim=-1).values
    count = ranked.shape[-1] // size
    return ranked[..., : count * size].unflatten(-1, (count, size)).sum(dim=-1)


class _BlockGroups:
    """The importance of every next group of a block."""

    def __init__(self, scores: BlockScores):
        # heads in the order in which they go
        order = scores.heads.argsort(stable=True)
        self.heads = _grouped(scores.heads, GROUPS["heads"]).tolist()
        self.mlp = _grouped(scores.mlp, GROUPS["mlp"]).tolist()
        # of the heads that are left when the first h are gone: [h, groups]
        self.qk, self.v = (
            _grouped(own[order], GROUPS[part]).flip(0).cumsum(0).flip(0)
            for part, own in (("qk", scores.qk), ("v", scores.v))
        )

    def importance(self, part: str, done: int, heads_gone: int) -> float:
        """Of the next group of `part`, of which `done` groups are gone."""
        if part in ("heads", "mlp"):
            return float(getattr(self, part)[done])
        return float(getattr(self, part)[heads_gone, done])


class _Greedy:
    """One greedy removal: the widths so far, and what the next group of every dimension is worth.

    A dimension's saving depends on its own block and the embedding only, so that a removal renews
    few of them.
    """

    def __init__(
        self, scores: Scores, widths: Widths, cost: Cost, eta: float, fixed: Collection[str]
    ):
        self.widths, self._start, self._cost, self._eta = widths, widths, cost, eta
        self._floor = least(widths, fixed)
        self._blocks = [_BlockGroups(block) for block in scores.blocks]
        self._embedding = _grouped(scores.embedding, GROUPS["embedding"]).tolist()
        self.cost = cost(widths)
        self._next: dict[_Key, tuple[float, float]] = {}
        self._renew(self._keys())
        groups = {
            key: (self._width(key) - self._least(key)) // GROUPS[key[0]] for key in self._next
        }
        count = max(1, sum(groups.values()))
        every = (self._importance(key, i) for key, many in groups.items() for i in range(many))
        # a weightless model has no importances to compare
        self._usual = sum(every) / count or 1.0
        self._usual_saving = (self.cost - cost(self._floor)) / count or 1.0

    def _keys(self) -> list[_Key]:
        keys = [(part, b) for b in range(len(self.widths.blocks)) for part in PARTS]
        return [("embedding", -1), *keys]

    @staticmethod
    def _of(widths: Widths, key: _Key) -> int:
        part, block = key
        return int(widths.embedding if block < 0 else getattr(widths.blocks[block], part))

    def _width(self, key: _Key) -> int:
        return self._of(self.widths, key)

    def _least(self, key: _Key) -> int:
        return self._of(self._floor, key)

    def _importance(self, key: _Key, done: int) -> float:
        part, block = key
        if block < 0:
            return float(self._embedding[done])
        gone = self._start.blocks[block].heads - self.widths.blocks[block].heads
        return self._blocks[block].importance(part, done, gone)

    def _without(self, key: _Key) -> Widths:
        """The widths with one group less."""
        part, block = key
        width = self._width(key) - GROUPS[part]
        if block < 0:
            return replace(self.widths, embedding=width)
        blocks = list(self.widths.blocks)
        blocks[block] = replace(blocks[block], **{part: width})
        return replace(self.widths, blocks=tuple(blocks))

    def _renew(self, keys: list[_Key]) -> None:
        for key in keys:
            self._next.pop(key, None)
            if self._width(key) > self._least(key):
                done = (self._of(self._start, key) - self._width(key)) // GROUPS[key[0]]
                saved = self.cost - self._cost(self._without(key))
                self._next[key] = self._importance(key, done), saved

    def _score(self, key: _Key) -> tuple[float, _Key]:
        """Lowest goes first; of equals the first dimension by name, whatever came before."""
        importance, saved = self._next[key]
        return importance / self._usual - self._eta * saved / self._usual_saving, key

    def remove(self, target: float) -> None:
        """One group less: that of the lowest score, unless it ends far below the target. Then one
        that does not and saves something; where none does, the one that ends nearest below.
        """
        key, low = min(self._next, key=self._score), (1 - SLACK) * target
        ends = {k: self.cost - saved for k, (_, saved) in self._next.items()}
        if ends[key] < low:
            short = [k for k, end in ends.items() if low <= end < self.cost]
            if short:
                key = min(short, key=self._score)
            else:
                below = [k for k, end in ends.items() if end <= target]
                nearest = max(ends[k] for k in below)
                key = min((k for k in below if ends[k] == nearest), key=self._score)
        self.widths = self._without(key)
        self.cost = self._cost(self.widths)
        own = [(part, key[1]) for part in PARTS] if key[1] >= 0 else self._keys()
        self._renew([("embedding", -1), *own])
