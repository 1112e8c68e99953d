"""ToMe, Token Merging (Bolya, Fu, Dai, Zhang, Feichtenhofer and Hoffman, "Token Merging: Your ViT
But Faster", ICLR 2023, arXiv:2210.09461): merges the r most similar pairs of patches per block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.merging import bipartite_match, merge_matched
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import PUBLISHED_PATCHES, Paper, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Choice, Counts, Float, IntOrList
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import check_mergeable, pruned_blocks
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import exclusive
from vitpareto.methods.engine.tokens import Tokens


def merge_schedule(r: int | tuple[int, ...], inflection: float, depth: int) -> tuple[int, ...]:
    """Patches to merge in each block: constant at inflection 0, decreasing below 0, increasing
    above 0. It is `int(low + step * block)`, from `low = int(r (1 - inflection))` to `2 r - low`.
    """
    if isinstance(r, tuple):
        return r
    low = int(r * (1.0 - inflection))
    step = (2 * r - 2 * low) / max(1, depth - 1)
    return tuple(int(low + step * block) for block in range(depth))


class ToMeReduction(Reduction):
    """Bipartite soft matching on the mean of the keys over heads.

    counts: patches left after each block. proportional: attention adds log size (eq. 1).
    """

    def __init__(self, counts: tuple[int, ...], proportional: bool):
        super().__init__()
        self.counts = counts
        self.proportional = proportional

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Tensor | None:
        """The metric [B, N, D]; None if nothing merges."""
        return attended.k.mean(dim=1) if self.counts[block] < tokens.patches else None

    def reduce(self, block: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if seen is None:
            return tokens
        r = tokens.patches - self.counts[block]
        return merge_matched(tokens, bipartite_match(seen, tokens.prefix, r))


@register
class ToMe(Method):
    """In each block the r best edges of a bipartite matching merge into size-weighted means."""

    name = "tome"
    summary = "merge the r most similar pairs of patches in every block"
    paper = Paper(
        "Token Merging: Your ViT But Faster",
        "Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman",
        2023,
        "https://arxiv.org/abs/2210.09461",
    )
    parameters = (
        IntOrList("r", "patches merged in each block, one number or a list"),
        Float("inflection", "shape of the schedule: 0 constant, -1 decreasing, 1 increasing",
              default=0.0, low=-1, high=1),
        Choice("prop_attn", "add log size to attention logits; False for models trained with "
               "merging", default=True, choices=(True, False)),
        Counts("counts", "patches left after each block; replaces r and inflection"),
    )  # fmt: skip
    space = (
        Float("r_fraction", "patches merged in each block, as a fraction of the initial patches",
              low=0.01, high=0.12),
        Float("inflection", "shape of the schedule", low=-1, high=1),
    )  # fmt: skip
    presets = tuple(
        Preset(f"r={r}", {"r_fraction": r / PUBLISHED_PATCHES, "inflection": 0.0}, "ToMe, table 1")
        for r in (8, 13, 16)
    )
    identity = {"r": 0}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        r = max(1, round(choices["r_fraction"] * shape.patches))
        return {"r": r, "inflection": round(choices["inflection"], 3)}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        if params.get("counts") is not None and params.get("r") is not None:
            raise exclusive(self.name, "r", "inflection")
        return super().check(params, shape)

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        r = params.get("r")
        if isinstance(r, tuple) and len(r) != shape.depth:
            raise BadInput(
                f"tome.r must have one entry per block, {shape.depth} (got {len(r)})",
                Code.MISMATCH,
                name="r",
                where="tome",
                got=len(r),
                expected=shape.depth,
            )
        check_mergeable(self.counts(params, shape), shape, self.name)

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        if params.get("counts") is not None:
            return params["counts"]
        out, n = [], shape.patches
        for r in merge_schedule(params["r"], params["inflection"], shape.depth):
            n -= min(r, n // 2)
            out.append(n)
        return tuple(out)

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """Similarities: |A| * |B| * D in every block that merges."""
        total = 0
        for block, n in pruned_blocks(counts, shape):
            first = shape.prefix % 2
            a = (n - first + 1) // 2
            total += a * (n - a) * shape.blocks[block].qk
        return total

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {"counts": self.counts(params, shape), "prop_attn": params["prop_attn"]}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> ToMeReduction:
        return ToMeReduction(self.counts(params, shape), params["prop_attn"])
