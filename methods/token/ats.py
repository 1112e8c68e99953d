"""ATS, Adaptive Token Sampling (Fayyaz, Abbasi Koohpayegani, Rezaei Jafari, Sengupta, Vaezi Joze,
Sommerlade, Pirsiavash and Gall, "Adaptive Token Sampling for Efficient Vision Transformers",
ECCV 2022, arXiv:2111.15667): samples patches by their significance, a number per image.

In the published code an image's result depends on its batch. Here padding is masked, so that an
image's logits are those of the image alone. In an exported program every image is padded to the
schedule's bound, so that shapes are fixed; the logits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import PUBLISHED_DEPTH, Paper, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float, Int, IntOrList, Layers
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import check_layers, scale_layers
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.significance import significance
from vitpareto.methods.engine.tokens import Tokens, keep_chosen, rising

#: the published code for DeiT-S: every block from the fourth on
PUBLISHED_STAGES: dict[str, Any] = {"first": 0.25, "stages": 9, "spacing": 1 / PUBLISHED_DEPTH}


def sample(share: Tensor, valid: Tensor | None, targets: int) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling of patches by significance ("Token Sampling").

    Patches are ranked by increasing significance, ties by position. The cumulative sums are scaled
    to [0, 1]. Each of `targets` values, spaced evenly from the smallest sum above 0 to 1, picks the
    rank with the nearest sum, the lower one at the midpoint. A rank is picked if a target lies
    between the midpoints to its neighbours, which takes n operations per image instead of n times
    `targets` distances.

    Args:
        share: significance [B, n], 0 for padding.
        valid: [B, n] bool, False for padding; None without padding.
        targets: how many samples are drawn.

    Returns:
        (picked [B, n] bool by rank, order [B, n]: the patch of each rank, padding last). At least
        one rank is picked, the most significant.
    """
    n = share.shape[1]
    if valid is None:
        last = share.new_full((share.shape[0], 1), n - 1, dtype=torch.int64)
    else:
        last = valid.sum(dim=1, keepdim=True) - 1
        share = share.masked_fill(~valid, float("inf"))
    mass, order = rising(share)
    rank = torch.arange(n, device=share.device)
    cdf = mass.masked_fill(rank > last, 0.0).cumsum(dim=1)
    tiny = torch.finfo(cdf.dtype).tiny
    low, high = cdf[:, :1], cdf[:, -1:]
    cdf = (cdf - low) / (high - low).clamp(min=tiny)
    first = torch.where(cdf > 0, cdf, 1.0).amin(dim=1, keepdim=True)
    step = ((1 - first) / max(1, targets - 1)).clamp(min=tiny)
    # how many targets lie at or below the midpoint between a rank and the next
    middle = (cdf[:, :-1] + cdf[:, 1:]) / 2
    below = (((middle - first) / step).floor() + 1).clamp(0, targets)
    below = torch.where(rank[:-1] >= last, float(targets), below)
    ends = below.new_zeros(share.shape[0], 1)
    below = torch.cat([ends, below, ends + targets], dim=1)
    # not `>`, so that an image with NaN keeps its patches and its logits show the NaN
    return ~(below[:, 1:] <= below[:, :-1]), order


class AtsReduction(Reduction):
    """Samples patches at the blocks of `caps`.

    targets: how many samples are drawn. caps: the most patches that each prune layer leaves.
    """

    def __init__(self, targets: int, caps: dict[int, int]):
        super().__init__()
        self.targets, self.caps = targets, caps

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Tensor | None:
        """Significance [B, n]; None if there is nothing to choose."""
        if block not in self.caps or tokens.patches == 1:
            return None
        return significance(tokens, attended)

    def reduce(self, block: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if seen is None:
            return tokens
        cap = min(self.caps[block], tokens.patches)
        picked, order = sample(seen, tokens.valid, self.targets)
        count = picked.to(torch.int64).cumsum(dim=1)
        found = count[:, -1]
        kept = picked & (found[:, None] - count < cap)
        chosen = torch.zeros_like(kept).scatter(1, order, kept)
        left = found.clamp(max=cap)
        tokens = replace(tokens, figures={"picked": found, "kept": left})
        if torch.compiler.is_exporting():
            return keep_chosen(tokens, chosen, cap)
        least, most = torch.stack(left.aminmax()).tolist()
        out = keep_chosen(tokens, chosen, most)
        # without padding no mask, because CUDA's flash kernel takes none
        return replace(out, valid=None) if least == most else out


@register
class Ats(Method):
    """Keeps the patches that inverse transform sampling of their significance picks.

    As many samples are drawn as the model has patches. Several samples may pick the same patch, so
    the number of patches left differs between images. Of more than `max_tokens` the most
    significant stay.
    """

    name = "ats"
    summary = "sample patches by class attention times value norm, a number per image"
    paper = Paper(
        "Adaptive Token Sampling for Efficient Vision Transformers",
        "Fayyaz, Abbasi Koohpayegani, Rezaei Jafari, Sengupta, Vaezi Joze, Sommerlade, Pirsiavash, "
        "Gall",
        2022,
        "https://arxiv.org/abs/2111.15667",
    )
    parameters = (
        Layers("prune_layers", "blocks that sample; default: every twelfth of the depth, from a "
               "quarter on", default=None),
        IntOrList("max_tokens", "most patches left at each prune layer, one number or a list; "
                  "default: no limit", default=None, low=1, each="prune layer"),
    )  # fmt: skip
    space = (
        Float("first", "first prune layer, as a fraction of the depth", low=0.0, high=0.75),
        Int("stages", "number of prune layers", low=1, high=9),
        Float("spacing", "blocks between prune layers, as a fraction of the depth",
              low=1 / 12, high=1 / 3, when=("stages", tuple(range(2, 10)))),
        Float("max_tokens_fraction", "most patches left, as a fraction of the initial patches",
              low=0.1, high=1.0),
    )  # fmt: skip
    presets = (
        Preset(
            "every block",
            {**PUBLISHED_STAGES, "max_tokens_fraction": 1.0},
            "ATS's published DeiT-S configuration",
        ),
    )
    identity = {"prune_layers": ()}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        layers = scale_layers(
            shape.depth, choices["first"], choices["stages"], choices.get("spacing", 0.0)
        )
        most = max(1, round(choices["max_tokens_fraction"] * shape.patches))
        return {"prune_layers": layers, "max_tokens": most if most < shape.patches else None}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        # None means the default
        checked = super().check({k: v for k, v in params.items() if v is not None})
        if shape is not None:
            if checked["prune_layers"] is None:
                checked["prune_layers"] = scale_layers(shape.depth, **PUBLISHED_STAGES)
            self.check_shape(checked, shape)
        return checked

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        layers, most = params["prune_layers"], params["max_tokens"]
        check_layers(shape.depth, layers, self.name)
        if isinstance(most, Sequence) and len(most) != len(layers):
            raise BadInput(
                "ats.max_tokens must be one number or one entry per prune layer, "
                f"{len(layers)} (got {len(most)})",
                Code.MISMATCH,
                name="max_tokens",
                where="ats",
                got=len(most),
                expected=len(layers),
            )

    def caps(self, params: dict[str, Any], shape: ModelShape) -> dict[int, int]:
        """The most patches left after each prune layer; a cap also limits all later layers."""
        layers, most = params["prune_layers"], params["max_tokens"]
        caps = most if isinstance(most, Sequence) else [most or shape.patches] * len(layers)
        out, n = {}, shape.patches
        for block, cap in zip(layers, caps, strict=True):
            out[block] = n = min(n, cap)
        return out

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...] | None:
        """None, because images decide, unless there is no prune layer."""
        return None if params["prune_layers"] else shape.dense_counts()

    def bounds(
        self, params: dict[str, Any], shape: ModelShape
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """At least one patch, the most significant; at most the cap."""
        caps = self.caps(params, shape)
        low, high = [shape.patches], [shape.patches]
        for block in range(shape.depth):
            low.append(1 if block in caps else low[-1])
            high.append(caps.get(block, high[-1]))
        return tuple(low[1:]), tuple(high[1:])

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """The class row at each prune layer with more than one patch."""
        before = (shape.patches, *counts[:-1])
        return sum(shape.row_macs(b, before[b]) for b in params["prune_layers"] if before[b] > 1)

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {"caps": [list(cap) for cap in self.caps(params, shape).items()]}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> AtsReduction:
        return AtsReduction(shape.patches, self.caps(params, shape))
