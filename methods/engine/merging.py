"""ToMe's bipartite matching and merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR
2023, arXiv:2210.09461), which PPT uses too. Tensors in, tensors out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitpareto.methods.engine.tokens import Tokens, gather, regroup


def bipartite_match(metric: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching (Bolya et al., ICLR 2023, section 3.2): which r patches go where.

    metric [B, N, D], prefix tokens included: even positions are set A, odd ones B, as the paper
    counts them; a prefix token is neither source nor destination. Each patch of A has an edge to
    its most similar (cosine) patch of B; the r best edges are taken.

    Returns (rest [B, a - r], source [B, r], target [B, r]): indices into A's and, for `target`,
    B's patches (see `bipartite_split`), `rest` in rising order.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = bipartite_split(metric[:, prefix:], prefix)
    best, target = (a @ b.transpose(-1, -2)).max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    source = order[:, :r]
    return order[:, r:].sort(dim=1).values, source, target.gather(1, source)


def bipartite_split(patches: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Patches [B, n, …] -> those at even (A) and at odd (B) positions of the whole sequence."""
    first = prefix % 2
    return patches[:, first::2], patches[:, 1 - first :: 2]


def merge_matched(tokens: Tokens, match: tuple[Tensor, Tensor, Tensor]) -> Tokens:
    """Merge by `bipartite_match`: size-weighted means; order: prefix, rest of A, all of B."""
    rest, source, target = match
    prefix, patches = tokens.x[:, : tokens.prefix], tokens.x[:, tokens.prefix :]
    a, b = bipartite_split(patches, tokens.prefix)
    size_a, size_b = bipartite_split(tokens.sizes(), tokens.prefix)
    added = size_a.gather(1, source)
    total = size_b.scatter_add(1, target, added)
    # each weighed by its share before it is added: a sum could leave a half precision's range
    share = (added / total.gather(1, target)).to(patches.dtype)
    where = target[..., None].expand(-1, -1, patches.shape[-1])
    b = b * (size_b / total).to(patches.dtype)[..., None]
    b = b.scatter_add(1, where, gather(a, source) * share[..., None])
    group = tokens.group
    if group is not None:
        place_a = rest.new_zeros(size_a.shape)
        left = rest.shape[1]
        place_a = place_a.scatter(1, rest, torch.arange(left, device=rest.device).expand_as(rest))
        place_a = place_a.scatter(1, source, target + left)
        place_b = (torch.arange(size_b.shape[1], device=rest.device) + left).expand(size_b.shape)
        moved = rest.new_empty((rest.shape[0], tokens.patches))
        first = tokens.prefix % 2
        moved[:, first::2], moved[:, 1 - first :: 2] = place_a, place_b
        group = regroup(group, moved)
    return replace(
        tokens,
        x=torch.cat([prefix, gather(a, rest), b], dim=1),
        size=torch.cat([size_a.gather(1, rest), total], dim=1),
        group=group,
    )
