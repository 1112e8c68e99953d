"""The tokens of a forward and pure functions on them: keeping, padding, ordering.

Tensors in, tensors out: nothing here knows timm, a model, a file or a method's name. Everything is
chosen per image, so an image's result never depends on its batch; every operation has an ONNX form
(no stable sort, no `scatter_reduce(reduce="mean")`: the exporter turns that silently into a wrong
result).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens between two operations of the reduced forward, with all that travels with them.

    x: [B, P + n, C], prefix tokens first. prefix: P.
    size: [B, n], at least float32, how many original patches each stands for; None while all are
        1 (see `sizes`).
    valid: [B, n] bool, False for padding; None while there is none.
    group: [B, n0] int64, the current patch index that holds each original patch, -1 once dropped;
        None unless a trace is taken.
    per_patch: method state, each [B, n, …], gathered with the kept patches.
    per_image: method state, each [B, …], untouched by reductions.
    figures: what the method had to say about the last block (for traces), each [B].
    kept: [B, n], 1 or 0 with a gradient, in training alone: patches at 0 are as good as dropped,
        though they are still there (`soft_mask`). None: all are kept.
    """

    x: Tensor
    prefix: int
    size: Tensor | None = None
    valid: Tensor | None = None
    group: Tensor | None = None
    per_patch: dict[str, Tensor] = field(default_factory=dict)
    per_image: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None

    @property
    def patches(self) -> int:
        """n, padding included."""
        return self.x.shape[1] - self.prefix

    def counts(self) -> Tensor:
        """Tokens of each image, prefix included, padding not: int64 [B]."""
        batch, total = self.x.shape[:2]
        if self.valid is None:
            return torch.full((batch,), total, dtype=torch.int64, device=self.x.device)
        return self.valid.sum(dim=1) + self.prefix

    def sizes(self) -> Tensor:
        """`size`, or the ones that None stands for: [B, n] in at least float32, so that counts
        above 256 stay exact whatever x is.
        """
        if self.size is not None:
            return self.size
        wide = torch.promote_types(self.x.dtype, torch.float32)
        return self.x.new_ones(self.x.shape[0], self.patches, dtype=wide)

    def key_bias(self, proportional: bool) -> Tensor | None:
        """What is added to attention logits per key, [B, 1, 1, N]; None where it would be all 0.

        Padding gets -inf. With `proportional` a key that stands for s patches gets log s (ToMe,
        eq. 1), as if its s patches were all there. With `kept` it is [B, 1, N, N]: what is not kept
        is seen by nobody but itself (DynamicViT, section 3.3).
        """
        if self.kept is not None:
            return self._soft_bias(self.kept)
        if self.valid is None and (self.size is None or not proportional):
            return None
        batch = self.x.shape[0]
        bias = self.x.new_zeros(batch, self.patches)
        if self.size is not None and proportional:
            bias = self.size.log().to(self.x.dtype)
        if self.valid is not None:
            bias = bias.masked_fill(~self.valid, float("-inf"))
        head = self.x.new_zeros(batch, self.prefix)
        return torch.cat([head, bias], dim=1)[:, None, None, :]

    def _soft_bias(self, kept: Tensor) -> Tensor:
        bias = soft_mask(kept).log().to(self.x.dtype)
        bias = torch.cat([bias.new_zeros(len(bias), self.prefix), bias], dim=1)
        own = torch.eye(bias.shape[1], dtype=torch.bool, device=bias.device)
        return torch.where(own, bias.new_zeros(()), bias[:, None, None, :])

    def pool_weight(self) -> Tensor | None:
        """Weight of each patch in a pooled mean, [B, n]: its size, 0 for padding; None if all 1.

        In at least float32, as `sizes`.
        """
        if self.kept is not None:
            return soft_mask(self.kept)
        if self.size is None and self.valid is None:
            return None
        weight = self.sizes()
        return weight if self.valid is None else weight * self.valid.to(weight.dtype)


def soft_mask(kept: Tensor) -> Tensor:
    """A mask [B, n] whose log has a gradient at 0 too: it is exp(-64) there, which no sum sees and
    whose log bfloat16 holds.
    """
    return kept.to(torch.promote_types(kept.dtype, torch.float32)) + math.exp(-64)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values [B, n, …] at index [B, k] -> [B, k, …]."""
    if values.dim() == 2:
        return values.gather(1, index)
    # whole rows by number: an index for every channel took a CPU three times as long
    batch, n = values.shape[:2]
    rows = index + torch.arange(batch, device=index.device)[:, None] * n
    return values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Indices of patches [B, k] -> of the whole sequence, its prefix first: [B, prefix + k]."""
    head = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([head, index + prefix], dim=1)


def top_k(score: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores, in rising order of index. score [B, n] -> int64 [B, k]."""
    return score.topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def regroup(group: Tensor | None, moved: Tensor) -> Tensor | None:
    """Follow the original patches. group [B, n0]; moved [B, n]: each patch's new index or -1."""
    if group is None:
        return None
    there = moved.gather(1, group.clamp(min=0))
    return torch.where(group >= 0, there, group)


def keep(tokens: Tokens, index: Tensor, valid: Tensor | None = None) -> Tokens:
    """Only the patches at index [B, k] (of the current n) stay, in that order; the prefix stays.

    `valid` [B, k] marks padding among them (False); None: as before for the patches kept.
    """
    if valid is None and tokens.valid is not None:
        valid = gather(tokens.valid, index)
    group = tokens.group
    if group is not None:
        place = torch.arange(index.shape[1], device=index.device).expand_as(index)
        if valid is not None:
            place = place.masked_fill(~valid, -1)
        moved = index.new_full((index.shape[0], tokens.patches), -1).scatter(1, index, place)
        group = regroup(group, moved)
    return replace(
        tokens,
        x=gather(tokens.x, with_prefix(index, tokens.prefix)),
        size=None if tokens.size is None else gather(tokens.size, index),
        valid=valid,
        group=group,
        per_patch={name: gather(value, index) for name, value in tokens.per_patch.items()},
        kept=None if tokens.kept is None else gather(tokens.kept, index),
    )


def keep_padded(tokens: Tokens, score: Tensor, count: Tensor) -> Tokens:
    """Each image keeps its own number of patches: the count[b] highest of score [B, n].

    The batch is padded to its largest count and padding is marked in `valid`, so an image's result
    is that of the image alone. count: int64 [B].
    """
    n = tokens.patches
    if tokens.valid is not None:
        score = score.masked_fill(~tokens.valid, float("-inf"))
    most = int(count.max())
    order = score.topk(most, dim=1).indices
    padding = torch.arange(most, device=order.device)[None, :] >= count[:, None]
    # padding goes behind the kept patches, which stay in their order
    index = (order + padding * n).sort(dim=1).values
    valid = index < n
    index = torch.where(valid, index, index - n)
    return keep(tokens, index, None if bool(valid.all()) else valid)


def rising(score: Tensor) -> tuple[Tensor, Tensor]:
    """score [B, n] sorted upwards: (values, indices), both [B, n]; equal ones in order of position.

    A stable sort by hand: it has no ONNX form, and an unstable one orders ties at will.
    """
    n = score.shape[1]
    values, order = score.sort(dim=1)
    # equal values get one number; sorting number * n + index orders the indices inside each
    number = (values[:, 1:] > values[:, :-1]).to(torch.int64).cumsum(dim=1)
    first = torch.cat([torch.zeros_like(order[:, :1]), number], dim=1) * n
    return values, (first + order).sort(dim=1).values - first


def keep_chosen(tokens: Tokens, chosen: Tensor, most: int) -> Tokens:
    """Each image keeps the patches marked in chosen [B, n] bool, in their order, padded to `most`.

    Padding is never to be chosen, nor more than `most` patches. All shapes follow from `most`.
    """
    n = tokens.patches
    place = torch.arange(n, device=chosen.device)
    # padding goes behind the kept patches
    index = torch.where(chosen, place, place + n).sort(dim=1).values[:, :most]
    valid = index < n
    return keep(tokens, torch.where(valid, index, index - n), valid)
