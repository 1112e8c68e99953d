"""PPT, Token Pruning and Pooling (Wu, Zeng, Wang and Chen, "PPT: Token Pruning and Pooling for
Efficient Vision Transformers", 2023, arXiv:2310.01812): drops the least significant patches of an
image if their significances differ, and merges the most similar ones if they do not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.merging import bipartite_match
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import PUBLISHED_PATCHES, Paper, Preset
from vitpareto.methods.engine.method_registry import get, register
from vitpareto.methods.engine.parameters import Counts, Float, Int, Layers
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import (
    check_layers,
    check_mergeable,
    pruned_blocks,
    scale_layers,
)
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.significance import significance
from vitpareto.methods.engine.staged import STAGED_SPACE, exclusive
from vitpareto.methods.engine.tokens import Tokens, gather, keep, regroup, rising

PUBLISHED_STAGES: dict[str, Any] = {"first": 0.25, "stages": 3, "spacing": 0.25}
#: 7e-5 at 196 patches, times patches²: normalised significances are proportional to 1 / patches
PUBLISHED_THRESHOLD = 7e-5 * PUBLISHED_PATCHES**2


def merge_or_keep(
    tokens: Tokens, match: tuple[Tensor, Tensor, Tensor], kept: Tensor, pooled: Tensor
) -> Tokens:
    """Images with pooled [B] merge by `match`, as `merge_matched` does; the others keep the patches
    at kept [B, n - r].

    Both take one gather. In images that keep, merged patches are added with weight 0.
    """
    rest, source, target = match
    first = tokens.prefix % 2
    others = torch.arange(1 - first, tokens.patches, 2, device=rest.device)
    merged = torch.cat([2 * rest + first, others.expand(rest.shape[0], -1)], dim=1)
    gone, into = 2 * source + first, target + rest.shape[1]
    tokens = replace(tokens, size=tokens.sizes())
    out = keep(tokens, torch.where(pooled[:, None], merged, kept))
    size, before = cast(Tensor, out.size), cast(Tensor, tokens.size)
    added = before.gather(1, gone) * pooled[:, None].to(size.dtype)
    total = size.scatter_add(1, into, added)
    scale = torch.cat([size.new_ones(size.shape[0], tokens.prefix), size / total], dim=1)
    share = (added / total.gather(1, into)).to(tokens.x.dtype)
    rows = gather(tokens.x, gone + tokens.prefix) * share[..., None]
    target_rows = (into + tokens.prefix)[..., None].expand_as(rows)
    group = out.group
    if tokens.group is not None and group is not None:
        moved = gone.new_full(before.shape, -1).scatter(1, gone, into)
        index = cast(Tensor, regroup(tokens.group, moved))
        group = torch.where(pooled[:, None] & (index >= 0), index, group)
    return replace(
        out,
        x=(out.x * scale.to(out.x.dtype)[..., None]).scatter_add(1, target_rows, rows),
        size=total,
        group=group,
    )


class PptReduction(Reduction):
    """Computes both selections and takes one per image, so that all shapes are fixed.

    counts: patches left after each block. threshold: variance of the significance below which an
    image's patches are merged.
    """

    proportional = True

    def __init__(self, counts: tuple[int, ...], threshold: float):
        super().__init__()
        self.counts, self.threshold = counts, threshold

    def observe(
        self, block: int, tokens: Tokens, attended: Attended
    ) -> tuple[Tensor, Tensor] | None:
        """(significance [B, n], metric of the matching [B, N, D]); None if nothing is reduced."""
        if self.counts[block] >= tokens.patches:
            return None
        return significance(tokens, attended), attended.k.mean(dim=1)

    def reduce(self, block: int, tokens: Tokens, seen: tuple[Tensor, Tensor] | None) -> Tokens:
        if seen is None:
            return tokens
        share, metric = seen
        left = self.counts[block]
        variance = share.var(dim=1)
        pooled = variance < self.threshold
        match = bipartite_match(metric, tokens.prefix, tokens.patches - left)
        # most significant first, as in the published code: a later matching splits by position
        kept = rising(-share)[1][:, :left]
        return replace(
            merge_or_keep(tokens, match, kept, pooled),
            figures={"pooled": pooled.to(share.dtype), "variance": variance},
        )


@register
class Ppt(Method):
    """Each prune layer removes r patches, by dropping or merging.

    If the variance of an image's significance is below `threshold`, the r best edges of ToMe's
    matching merge. Otherwise the r least significant patches are dropped. Sizes stay with the
    patches. A matching merges at most half of the patches, so at most half are dropped: of DeiT-S's
    last 96, at the published r = 50, 48, which agrees with its published 2.944 G.
    """

    name = "ppt"
    summary = "drop the least significant patches, or merge similar ones if significances are alike"
    paper = Paper(
        "PPT: Token Pruning and Pooling for Efficient Vision Transformers",
        "Wu, Zeng, Wang, Chen",
        2023,
        "https://arxiv.org/abs/2310.01812",
    )
    parameters = (
        Int("r", "patches dropped or merged at each prune layer, at most half of them", low=0),
        Layers("prune_layers", "blocks that reduce; default: every quarter of the depth",
               default=None),
        Float("threshold", "variance of the significance below which an image's patches merge; "
              "default: 7e-5 at 196 patches, scaled by 1 / patches²", default=None, low=0.0),
        Counts("counts", "patches left after each block; replaces r and prune_layers"),
    )  # fmt: skip
    space = (
        Float("r_fraction", "r as a fraction of the initial patches", low=0.02, high=0.3),
        *(p for p in STAGED_SPACE if p.name in PUBLISHED_STAGES),
        Float("threshold_patches2", "threshold * patches²", low=0.1, high=30.0, log=True),
    )  # fmt: skip
    presets = tuple(
        Preset(
            name,
            {
                "r_fraction": 50 / PUBLISHED_PATCHES,
                **PUBLISHED_STAGES,
                "threshold_patches2": threshold * PUBLISHED_PATCHES**2,
            },
            source,
        )
        for name, threshold, source in (
            ("r=50", 7e-5, "PPT README, DeiT-S untrained"),
            ("r=50, to fine-tune", 6e-5, "PPT's fine-tuning (learning rate 1e-5, 50 epochs)"),
        )
    )
    identity = {"r": 0}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        layers = scale_layers(
            shape.depth, choices["first"], choices["stages"], choices.get("spacing", 0.0)
        )
        r = max(1, round(choices["r_fraction"] * shape.patches))
        threshold = choices["threshold_patches2"] / shape.patches**2
        return {
            "r": r,
            "prune_layers": layers,
            "threshold": float(f"{threshold:.4g}"),
        }

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        if params.get("counts") is not None and any(
            params.get(name) is not None for name in ("r", "prune_layers")
        ):
            raise exclusive(self.name, "r", "prune_layers")
        # None means the default
        checked = super().check({k: v for k, v in params.items() if v is not None})
        if shape is None:
            return checked
        if checked.get("counts") is None and checked["prune_layers"] is None:
            checked["prune_layers"] = scale_layers(shape.depth, **PUBLISHED_STAGES)
        if checked.get("threshold") is None:
            threshold = PUBLISHED_THRESHOLD / shape.patches**2
            checked["threshold"] = float(f"{threshold:.4g}")
        given = {k: v for k, v in checked.items() if v is not None}
        return super().check(given, shape)

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        check_layers(shape.depth, params.get("prune_layers") or (), self.name)
        check_mergeable(self.counts(params, shape), shape, self.name)

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        if params.get("counts") is not None:
            return params["counts"]
        out, n = [], shape.patches
        for block in range(shape.depth):
            if block in params["prune_layers"]:
                n -= min(params["r"], n // 2)
            out.append(n)
        return tuple(out)

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """The class row and ToMe's similarities; both are computed for every image."""
        rows = sum(shape.row_macs(b, n) for b, n in pruned_blocks(counts, shape))
        return rows + get("tome").extra_macs(params, shape, counts)

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {"counts": self.counts(params, shape), "threshold": params["threshold"]}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> PptReduction:
        return PptReduction(self.counts(params, shape), params["threshold"])
