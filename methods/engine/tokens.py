"""The tokens of a forward and pure functions on them: keeping, padding, ordering.

Nothing here knows timm or a model. Everything is chosen per image, so that an image's result does
not depend on its batch. Every operation has an ONNX form: there is no stable sort, and no
`scatter_reduce(reduce="mean")`, which the exporter silently converts into a wrong result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens between two operations of the reduced forward, with their state.

    Attributes:
        x: [B, P + n, C], prefix tokens first.
        prefix: P, the number of prefix tokens (class, distillation, registers).
        size: [B, n] in at least float32, the number of original patches that each token stands
            for; None while all are 1 (see `sizes`).
        valid: [B, n] bool, False for padding; None without padding.
        group: [B, n0] int64, the index of the patch that holds each original patch, -1 once it is
            dropped; None unless a trace is recorded.
        per_patch: method state by name, each [B, n, …], gathered with the kept patches.
        per_image: method state by name, each [B, …], not changed by `keep`.
        figures: the method's numbers about the last block, for traces, each [B].
        kept: [B, n], 1 or 0 with a gradient, in training only: patches at 0 are masked out of
            attention and pooling instead of dropped (`soft_mask`); None if all are kept.
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
        """The number of patch tokens n, padding included."""
        return self.x.shape[1] - self.prefix

    def counts(self) -> Tensor:
        """The number of tokens of each image, prefix included, padding excluded: int64 [B]."""
        batch, total = self.x.shape[:2]
        if self.valid is None:
            return torch.full((batch,), total, dtype=torch.int64, device=self.x.device)
        return self.valid.sum(dim=1) + self.prefix

    def sizes(self) -> Tensor:
        """`size` with ones for None: [B, n] in at least float32, because bfloat16 does not hold
        every integer above 256.
        """
        if self.size is not None:
            return self.size
        wide = torch.promote_types(self.x.dtype, torch.float32)
        return self.x.new_ones(self.x.shape[0], self.patches, dtype=wide)

    def key_bias(self, proportional: bool) -> Tensor | None:
        """The bias on attention logits per key, [B, 1, 1, N]; None if it would be all 0.

        Padding gets -inf. If `proportional`, a key that stands for s patches gets log s (ToMe,
        eq. 1). With `kept` the bias is [B, 1, N, N]: a patch that is not kept is visible only to
        itself (DynamicViT, section 3.3).
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
        """The weight of each patch in a pooled mean, [B, n] in at least float32: its size, 0 for
        padding; None if all are 1.
        """
        if self.kept is not None:
            return soft_mask(self.kept)
        if self.size is None and self.valid is None:
            return None
        weight = self.sizes()
        return weight if self.valid is None else weight * self.valid.to(weight.dtype)


def soft_mask(kept: Tensor) -> Tensor:
    """A mask [B, n] whose log is finite and has a gradient at 0: exp(-64) there, which vanishes in
    sums and whose log is exact in bfloat16.
    """
    return kept.to(torch.promote_types(kept.dtype, torch.float32)) + math.exp(-64)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """The entries of values [B, n, …] at index [B, k]: [B, k, …]."""
    if values.dim() == 2:
        return values.gather(1, index)
    # index_select of whole rows is three times as fast on a CPU as gather with an index per channel
    batch, n = values.shape[:2]
    rows = index + torch.arange(batch, device=index.device)[:, None] * n
    return values.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, index.shape)


def with_prefix(index: Tensor, prefix: int) -> Tensor:
    """Indices in the whole sequence [B, prefix + k], prefix first, of patch indices [B, k]."""
    head = torch.arange(prefix, device=index.device).expand(index.shape[0], -1)
    return torch.cat([head, index + prefix], dim=1)


def top_k(score: Tensor, k: int) -> Tensor:
    """Indices of the k highest of score [B, n], in increasing order of index: int64 [B, k]."""
    return score.topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def regroup(group: Tensor | None, moved: Tensor) -> Tensor | None:
    """`Tokens.group` [B, n0] after a reduction. moved [B, n]: each patch's new index, or -1."""
    if group is None:
        return None
    index = moved.gather(1, group.clamp(min=0))
    return torch.where(group >= 0, index, group)


def keep(tokens: Tokens, index: Tensor, valid: Tensor | None = None) -> Tokens:
    """The prefix tokens and the patches at index [B, k], in that order.

    valid: [B, k], False for padding among them; None: as `tokens.valid`.
    """
    if valid is None and tokens.valid is not None:
        valid = gather(tokens.valid, index)
    group = tokens.group
    if group is not None:
        position = torch.arange(index.shape[1], device=index.device).expand_as(index)
        if valid is not None:
            position = position.masked_fill(~valid, -1)
        moved = index.new_full((index.shape[0], tokens.patches), -1).scatter(1, index, position)
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

    count: int64 [B]. The batch is padded to its largest count. Padding is marked in `valid`, so
    that an image's result is that of the image alone.
    """
    n = tokens.patches
    if tokens.valid is not None:
        score = score.masked_fill(~tokens.valid, float("-inf"))
    most = int(count.max())
    order = score.topk(most, dim=1).indices
    padding = torch.arange(most, device=order.device)[None, :] >= count[:, None]
    # padding goes behind the kept patches, which keep their order
    index = (order + padding * n).sort(dim=1).values
    valid = index < n
    index = torch.where(valid, index, index - n)
    return keep(tokens, index, None if bool(valid.all()) else valid)


def rising(score: Tensor) -> tuple[Tensor, Tensor]:
    """(values, indices) [B, n] of score [B, n] in increasing order, ties in order of position.

    torch's stable sort has no ONNX form, and an unstable sort orders ties arbitrarily.
    """
    n = score.shape[1]
    values, order = score.sort(dim=1)
    # equal values share a number; sorting number * n + index sorts the indices within each number
    number = (values[:, 1:] > values[:, :-1]).to(torch.int64).cumsum(dim=1)
    first = torch.cat([torch.zeros_like(order[:, :1]), number], dim=1) * n
    return values, (first + order).sort(dim=1).values - first


def keep_chosen(tokens: Tokens, chosen: Tensor, most: int) -> Tokens:
    """Each image keeps the patches marked in chosen [B, n] bool, in their order, padded to `most`.

    `chosen` must mark at most `most` patches per image and no padding. All shapes follow from
    `most`, so that the operation exports.
    """
    n = tokens.patches
    position = torch.arange(n, device=chosen.device)
    # padding goes behind the kept patches
    index = torch.where(chosen, position, position + n).sort(dim=1).values[:, :most]
    valid = index < n
    return keep(tokens, torch.where(valid, index, index - n), valid)
