"""PatchMerger (Renggli, Susano Pinto, Houlsby, Mustafa, Puigcerver and Riquelme, "Learning to Merge
Tokens in Vision Transformers", 2022, arXiv:2202.12015): learned queries mix all patches into a few
tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import Paper, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float, IntOrList, Layers
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import check_layers
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import LAYERS_SPACE, check_one_per_layer, chosen_layers
from vitpareto.methods.engine.tokens import Tokens, regroup


class Merger(nn.Module):
    """`softmax(Q LN(x)^T / sqrt(C)) LN(x)` of patches x [B, n, C], with queries Q [M, C].

    Q is initialised from N(0, 1), so that logits have variance 1 and the outputs differ.
    """

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(outputs, dim))
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # that of timm's blocks

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(merged [B, M, C], weights of each output over the patches [B, M, n])."""
        x = self.norm(patches)
        logits = F.linear(x, self.queries).transpose(1, 2)
        weight = (logits * self.queries.shape[1] ** -0.5).softmax(dim=-1)
        return weight @ x, weight


class PatchMergerReduction(Reduction):
    """outputs[i] tokens replace all patches after block layers[i].

    In a trace an original patch belongs to the output with the largest weight on it; an output may
    hold none. The outputs are not means over disjoint patches, so they have no size.
    """

    site = "after-block"

    def __init__(self, dim: int, layers: tuple[int, ...], outputs: tuple[int, ...]):
        super().__init__()
        self.stages = {block: stage for stage, block in enumerate(layers)}
        self.mergers = nn.ModuleList(Merger(dim, m) for m in outputs)

    def reduce(self, block: int, tokens: Tokens, seen: None) -> Tokens:
        if block not in self.stages:
            return tokens
        prefix, patches = tokens.x[:, : tokens.prefix], tokens.x[:, tokens.prefix :]
        merged, weight = self.mergers[self.stages[block]](patches)
        group = tokens.group
        if group is not None:
            group = regroup(group, weight.argmax(dim=1))
        # autocast may have merged in another dtype
        x = torch.cat([prefix, merged.to(patches.dtype)], dim=1)
        return replace(tokens, x=x, group=group)


@register
class PatchMerger(Method):
    """After each prune layer `num_tokens` mixtures replace the patches; prefix tokens pass."""

    name = "patchmerger"
    summary = "replace all patches by a few learned mixtures of them"
    paper = Paper(
        "Learning to Merge Tokens in Vision Transformers",
        "Renggli, Susano Pinto, Houlsby, Mustafa, Puigcerver, Riquelme",
        2022,
        "https://arxiv.org/abs/2202.12015",
    )
    site = "after-block"
    training = "required"
    mixes = True
    parameters = (
        Layers("prune_layers", "blocks after which patches are merged"),
        IntOrList("num_tokens", "patches left at each prune layer, one number or a list", low=1,
                  each="prune layer"),
    )  # fmt: skip
    space = (
        Float("rate", "patches left at each prune layer, as a fraction of the current patches",
              low=0.04, high=0.95, log=True),
        *LAYERS_SPACE,
    )  # fmt: skip
    presets = tuple(
        Preset(
            f"{round(100 * rate)}%",
            {"rate": rate, "first": 1 / 6, "stages": 3, "spacing": 0.25},
            "TRAM's table, PatchMerger rows",
        )
        for rate in (0.75, 0.5)
    )
    identity = {"prune_layers": (), "num_tokens": 1}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        layers, n = chosen_layers(choices, shape), shape.patches
        outputs: list[int] = []
        for _ in layers:
            if n == 1 and outputs:
                break
            n = max(1, int(n * choices["rate"]))
            outputs.append(n)
        return {"prune_layers": layers[: len(outputs)], "num_tokens": tuple(outputs)}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        checked = super().check(params)
        if isinstance(checked["num_tokens"], tuple):
            check_one_per_layer(checked, "num_tokens", self.name)
        return checked if shape is None else super().check(checked, shape)

    def outputs(self, params: dict[str, Any]) -> tuple[int, ...]:
        """Patches left at each prune layer."""
        number = params["num_tokens"]
        return number if isinstance(number, tuple) else (number,) * len(params["prune_layers"])

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        layers = params["prune_layers"]
        check_layers(shape.depth, layers, self.name)
        left = dict(zip(layers, self.outputs(params), strict=True))
        counts, n = [], shape.patches
        for block in range(shape.depth):
            if left.get(block, n) > n:
                raise BadInput(
                    f"patchmerger.num_tokens must be at most the {n} patches of block {block} "
                    f"(got {left[block]})",
                    Code.OUT_OF_RANGE,
                    name="num_tokens",
                    where="patchmerger",
                    block=block,
                    got=left[block],
                    accepted=n,
                )
            n = left.get(block, n)
            counts.append(n)
        return tuple(counts)

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        # with as many outputs as patches the outputs are still mixtures
        return not params["prune_layers"]

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """LayerNorm, scores and mixtures: (5 n + 2 M n) C at every prune layer."""
        before = (shape.patches, *counts[:-1])
        return sum((5 + 2 * counts[b]) * before[b] * shape.dim for b in params["prune_layers"])

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {"prune_layers": params["prune_layers"], "num_tokens": self.outputs(params)}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> PatchMergerReduction:
        return PatchMergerReduction(shape.dim, params["prune_layers"], self.outputs(params))
