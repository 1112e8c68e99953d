"""ToMe's bipartite matching and merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR
2023, arXiv:2210.09461), which PPT uses too. Tensors in, tensors out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitpareto.methods.engine.tokens import Tokens, gather, regroup


def bipartite_match(metric: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's bipartite soft matching (section 3.2): which r patches merge into which others.

    Tokens at even positions of the sequence form set A, those at odd positions set B. Each patch of
    A has an edge to its most similar patch of B by cosine similarity; the r best edges are taken.
    Prefix tokens are neither source nor target.

    Args:
        metric: [B, N, D], prefix tokens included.
        prefix: number of prefix tokens.
        r: number of patches to merge.

    Returns:
        (rest [B, a - r], source [B, r], target [B, r]): indices among A's patches, for `target`
        among B's (see `bipartite_split`); `rest` is in increasing order.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = bipartite_split(metric[:, prefix:], prefix)
    best, target = (a @ b.transpose(-1, -2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    source = order[:, :r]
    return order[:, r:].sort(dim=1).values, source, target.gather(1, source)


def bipartite_split(patches: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """(A, B): the patches [B, n, …] at even and at odd positions of the whole sequence."""
    first = prefix % 2
    return patches[:, first::2], patches[:, 1 - first :: 2]


def merge_matched(tokens: Tokens, match: tuple[Tensor, Tensor, Tensor]) -> Tokens:
    """The tokens merged as `bipartite_match` says, by size-weighted means.

    The order is: prefix, rest of A, all of B.
    """
    rest, source, target = match
    prefix, patches = tokens.x[:, : tokens.prefix], tokens.x[:, tokens.prefix :]
    a, b = bipartite_split(patches, tokens.prefix)
    size_a, size_b = bipartite_split(tokens.sizes(), tokens.prefix)
    added = size_a.gather(1, source)
    total = size_b.scatter_add(1, target, added)
    # weighted before adding, because a sum could overflow in half precision
    share = (added / total.gather(1, target)).to(patches.dtype)
    index = target[..., None].expand(-1, -1, patches.shape[-1])
    b = b * (size_b / total).to(patches.dtype)[..., None]
    b = b.scatter_add(1, index, gather(a, source) * share[..., None])
    group = tokens.group
    if group is not None:
        moved_a = rest.new_zeros(size_a.shape)
        left = rest.shape[1]
        moved_a = moved_a.scatter(1, rest, torch.arange(left, device=rest.device).expand_as(rest))
        moved_a = moved_a.scatter(1, source, target + left)
        moved_b = (torch.arange(size_b.shape[1], device=rest.device) + left).expand(size_b.shape)
        moved = rest.new_empty((rest.shape[0], tokens.patches))
        first = tokens.prefix % 2
        moved[:, first::2], moved[:, 1 - first :: 2] = moved_a, moved_b
        group = regroup(group, moved)
    return replace(
        tokens,
        x=torch.cat([prefix, gather(a, rest), b], dim=1),
        size=torch.cat([size_a.gather(1, rest), total], dim=1),
        group=group,
    )
