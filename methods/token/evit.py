"""EViT (Liang, Ge, Tong, Song, Wang and Xie, "Not All Patches are What You Need: Expediting Vision
Transformers via Token Reorganizations", ICLR 2022, arXiv:2202.07800): keeps the patches with the
highest class attention and fuses the others into one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method_declaration import Paper, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Choice
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import check_layers
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import (
    STAGED_PARAMETERS,
    STAGED_SPACE,
    StagedMethod,
    chosen_layers,
)
from vitpareto.methods.engine.tokens import Tokens, gather, keep, regroup, top_k, with_prefix


def patches_kept(n: int, keep_rate: float) -> int:
    """`ceil(keep_rate * n)`, at least 1. The product is rounded to a millionth of a patch first:
    0.55 * 100 is 55.00000000000001 in binary, and 55 patches are kept.
    """
    return max(1, math.ceil(round(keep_rate * n, 6)))


def keep_and_fuse(tokens: Tokens, index: Tensor, attention: Tensor) -> Tokens:
    """The patches at index [B, k], and the others fused into one, `sum_j a_j x_j`, after them.

    attention [B, n] is a, not renormalised, so the fused token is a weighted sum and not a mean: it
    has no `size`, and pooling counts it as one patch. In a trace it holds all fused patches, and
    the figure `fused` [B] is their number, which tells the fused token from a kept patch.
    """
    patches = tokens.x[:, tokens.prefix :]
    fused = attention.scatter(1, index, 0.0)[:, None] @ patches
    group = tokens.group
    if group is not None:
        left = index.shape[1]
        position = torch.arange(left, device=index.device).expand_as(index)
        moved = index.new_full((index.shape[0], tokens.patches), left).scatter(1, index, position)
        group = regroup(group, moved)
    x = torch.cat([gather(tokens.x, with_prefix(index, tokens.prefix)), fused], dim=1)
    count = torch.full_like(index[:, 0], tokens.patches - index.shape[1])
    return replace(tokens, x=x, group=group, figures={"fused": count})


class EViTReduction(Reduction):
    """Keeps the patches with the highest mean class attention over heads, `a_j = mean_h a_j^h`."""

    def __init__(self, kept: tuple[int, ...], fuse: bool):
        """kept: patches that stay in each block, without the fused one."""
        super().__init__()
        self.kept, self.fuse = kept, fuse

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Tensor | None:
        """a [B, n]; None if nothing is dropped."""
        if self.kept[block] >= tokens.patches:
            return None
        return attended.class_row()[..., tokens.prefix :].mean(dim=1)

    def reduce(self, block: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if seen is None:
            return tokens
        index = top_k(seen, self.kept[block])
        return keep_and_fuse(tokens, index, seen) if self.fuse else keep(tokens, index)


@register
class EViT(StagedMethod):
    """Each prune layer keeps the `ceil(n * keep_rate)` patches with the highest a. With `fuse` the
    others become one more patch, which competes at the next prune layer by its own attention. If
    nothing is dropped nothing is fused. A single dropped patch is replaced by `a_j x_j`, as
    published, although that saves no token.
    """

    name = "evit"
    summary = "keep the patches with the highest class attention (mean over heads), fuse the rest"
    paper = Paper(
        "Not All Patches are What You Need: Expediting Vision Transformers via Token "
        "Reorganizations",
        "Liang, Ge, Tong, Song, Wang, Xie",
        2022,
        "https://arxiv.org/abs/2202.07800",
    )
    parameters = (
        *STAGED_PARAMETERS,
        Choice("fuse", "fuse the dropped patches into one, weighted by attention", default=True,
               choices=(True, False)),
    )  # fmt: skip
    space = (
        *STAGED_SPACE,
        Choice("fuse", "fuse dropped patches", choices=(True, False)),
    )
    presets = tuple(
        Preset(
            f"{round(100 * rate)}%",
            {"keep_rate": rate, "first": 0.25, "stages": 3, "spacing": 0.25, "fuse": True},
            "EViT README, DeiT-S",
        )
        for rate in (0.7, 0.5)
    )

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {
            "keep_rate": round(choices["keep_rate"], 4),
            "prune_layers": chosen_layers(choices, shape),
            "fuse": choices["fuse"],
        }

    def kept(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        """Patches that stay in each block, without the fused one; all that enter it if nothing is
        dropped. Raises BadInput for an impossible schedule.
        """
        counts, fused = params.get("counts"), int(params["fuse"])
        layers = () if counts is not None else params["prune_layers"]
        check_layers(shape.depth, layers, self.name)
        out, n = [], shape.patches
        for block in range(shape.depth):
            stay = n
            if counts is not None and counts[block] < n:
                stay = counts[block] - fused
                if stay < 1:
                    raise BadInput(
                        "evit.counts must be at least 2 with fuse, a kept patch and the fused one "
                        f"(got {counts[block]} after block {block}); or set fuse to False",
                        Code.OUT_OF_RANGE,
                        name="counts",
                        where="evit",
                        block=block,
                        got=counts[block],
                        accepted=2,
                    )
            elif block in layers:
                stay = patches_kept(n, params["keep_rate"])
            out.append(stay)
            n = self._after(n, stay, fused)
        return tuple(out)

    def _after(self, n: int, stay: int, fused: int) -> int:
        """Patches left after a block that n patches enter and in which `stay` stay."""
        return stay + fused if stay < n else n

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        """Patches left after each block, the fused one included."""
        out, n = [], shape.patches
        for stay in self.kept(params, shape):
            n = self._after(n, stay, int(params["fuse"]))
            out.append(n)
        return tuple(out)

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        return self.kept(params, shape) == shape.dense_counts()

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {"kept": self.kept(params, shape), "fuse": params["fuse"]}

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """The class row, and n * C for the fused token, in every block that drops."""
        before, total = (shape.patches, *counts[:-1]), 0
        for block, (n, stay) in enumerate(zip(before, self.kept(params, shape), strict=True)):
            if stay < n:
                total += shape.row_macs(block, n) + int(params["fuse"]) * n * shape.dim
        return total

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> EViTReduction:
        return EViTReduction(self.kept(params, shape), params["fuse"])
