"""DynamicViT (Rao, Zhao, Liu, Lu, Zhou and Hsieh, "DynamicViT: Efficient Vision Transformers with
Dynamic Token Sparsification", NeurIPS 2021, arXiv:2106.02034): small trained predictors select
the patches to keep.
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
from vitpareto.methods.engine.parameters import Float, Layers, Rates
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import check_layers, no_patch_left, pruned_blocks
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import LAYERS_SPACE, check_one_per_layer, chosen_layers
from vitpareto.methods.engine.tokens import Tokens, keep, top_k


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class Predictor(nn.Module):
    """Logits [B, n, 2] (keep, drop) of patches [B, n, C], from each patch and the mean patch.

    The mean is over the patches that `kept` [B, n] marks with 1 (None: all of them).
    """

    def __init__(self, dim: int):
        super().__init__()
        half, quarter = dim // 2, dim // 4
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(),
            nn.Linear(quarter, 2),
        )  # fmt: skip
        self.apply(_initialise)

    def forward(self, patches: Tensor, kept: Tensor | None = None) -> Tensor:
        x = self.in_conv(patches)
        half = x.shape[-1] // 2
        own, other = x[..., :half], x[..., half:]
        if kept is None:
            mean = other.mean(dim=1, keepdim=True)
        else:
            # clamp: an image without kept patches has no mean
            share = kept / kept.sum(dim=1, keepdim=True).clamp_min(1)
            mean = (other * share[..., None]).sum(dim=1, keepdim=True)
        return self.out_conv(torch.cat([own, mean.expand(-1, x.shape[1], -1)], dim=-1))


class DynamicViTReduction(Reduction):
    """Keeps the patches with the highest keep scores; predictors[i] acts before block layers[i].

    In training nothing is dropped (section 3.3). Each stage draws which of the kept patches stay,
    by straight-through Gumbel-softmax: exactly 1 or 0, with the gradient of the softmax. Other
    patches are masked out of attention and pooling (`Tokens.kept`).

    dim: width of the tokens. layers: prune layers. counts: patches left after each block.
    """

    site = "after-block"
    #: weight of the ratio loss (lambda_ratio)
    ratio_weight = 2.0

    def __init__(self, dim: int, layers: tuple[int, ...], counts: tuple[int, ...]):
        super().__init__()
        self.counts = counts
        self.stages = {block - 1: stage for stage, block in enumerate(layers)}
        self.predictors = nn.ModuleList(Predictor(dim) for _ in layers)

    def reduce(self, block: int, tokens: Tokens, seen: None) -> Tokens:
        if self.training:
            return self._draw(block, tokens)
        if self.counts[block] >= tokens.patches:
            return tokens
        logits = self.predictors[self.stages[block]](tokens.x[:, tokens.prefix :])
        # the same order as the log-softmax, without ties from its rounding
        return keep(tokens, top_k(logits[..., 0] - logits[..., 1], self.counts[block]))

    def _draw(self, block: int, tokens: Tokens) -> Tokens:
        before = self.counts[block - 1] if block else tokens.patches
        if self.counts[block] >= before:
            return tokens
        predictor = self.predictors[self.stages[block]]
        logits = predictor(tokens.x[:, tokens.prefix :], tokens.kept)
        wide = torch.promote_types(logits.dtype, torch.float32)  # more than autocast's
        soft = F.gumbel_softmax(logits.to(wide), dim=-1)
        kept = (soft.argmax(dim=-1) == 0) + (soft[..., 0] - soft[..., 0].detach())
        if tokens.kept is not None:
            kept = tokens.kept * kept
        target = self.counts[block] / tokens.patches
        missed = ((kept.mean(dim=1) - target) ** 2)[:, None]
        stages = tokens.per_image.get("missed", missed[:, :0])
        per_image = {**tokens.per_image, "missed": torch.cat([stages, missed], dim=1)}
        return replace(tokens, kept=kept, per_image=per_image)

    def penalty(self, tokens: Tokens) -> Tensor | None:
        """The ratio loss (section 3.3): the squared difference between the fractions of patches
        kept and those of the schedule, averaged over images and stages.
        """
        missed = tokens.per_image.get("missed")
        return None if missed is None else self.ratio_weight * missed.mean()


@register
class DynamicViT(Method):
    """Before block prune_layers[i] the `int(n0 * keep_rates[i])` patches with the highest keep
    scores stay, where n0 is the model's number of patches.
    """

    name = "dynamicvit"
    summary = "keep the patches that small trained predictors score highest"
    paper = Paper(
        "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
        "Rao, Zhao, Liu, Lu, Zhou, Hsieh",
        2021,
        "https://arxiv.org/abs/2106.02034",
    )
    site = "after-block"
    training = "required"
    parameters = (
        Layers("prune_layers", "blocks before which patches are dropped, at least 1"),
        Rates("keep_rates", "fractions of the model's patches kept at each, never increasing"),
    )
    space = (
        Float("keep_rate", "fraction kept at each prune layer", low=0.2, high=0.95),
        *LAYERS_SPACE,
    )
    presets = tuple(
        Preset(
            f"{round(100 * rate)}%",
            {"keep_rate": rate, "first": 0.25, "stages": 3, "spacing": 0.25},
            "DynamicViT, keep ratio r, r^2, r^3 before blocks 3, 6, 9",
        )
        for rate in (0.7, 0.5)
    )
    identity = {"prune_layers": (), "keep_rates": ()}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        # a predictor reads the output of the block before it
        layers = chosen_layers({**choices, "first": max(choices["first"], 1 / shape.depth)}, shape)
        layers = tuple(block for block in layers if block >= 1)
        rates = [round(choices["keep_rate"] ** (stage + 1), 4) for stage in range(len(layers))]
        # on a small model the last stages may leave no patch: drop these stages
        rates = [rate for rate in rates if int(shape.patches * rate) >= 1]
        return {"prune_layers": layers[: len(rates)], "keep_rates": tuple(rates)}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        checked = super().check(params)
        layers, rates = checked["prune_layers"], checked["keep_rates"]
        check_one_per_layer(checked, "keep_rates", self.name)
        if 0 in layers:
            raise BadInput(
                "dynamicvit.prune_layers must be blocks from 1 on, because a predictor reads the "
                f"output of the block before it (got {list(layers)})",
                Code.OUT_OF_RANGE,
                name="prune_layers",
                where="dynamicvit",
                got=list(layers),
            )
        if any(b > a for a, b in zip(rates, rates[1:], strict=False)):
            raise BadInput(
                "dynamicvit.keep_rates must be fractions of the model's patches, never increasing "
                f"(got {list(rates)})",
                Code.OUT_OF_RANGE,
                name="keep_rates",
                where="dynamicvit",
                got=list(rates),
            )
        return checked if shape is None else super().check(checked, shape)

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        layers, rates = params["prune_layers"], params["keep_rates"]
        check_layers(shape.depth, layers, self.name)
        counts = list(shape.dense_counts())
        for before, rate in zip(layers, rates, strict=True):
            n = int(shape.patches * rate)
            if n < 1:
                setting = f"{shape.patches} patches, prune_layers {layers}, rates {rates}"
                raise no_patch_left(self.name, before, setting)
            counts[before - 1 :] = [n] * (shape.depth - before + 1)
        return tuple(counts)

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """LayerNorm and four linear layers of each predictor, over the patches it reads."""
        dim, half, quarter = shape.dim, shape.dim // 2, shape.dim // 4
        per_patch = 5 * dim + dim * dim + dim * half + half * quarter + quarter * 2
        return sum(per_patch * n for _, n in pruned_blocks(counts, shape))

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        # with the layers, because predictors are numbered by stage even if a stage drops nothing
        return {"prune_layers": params["prune_layers"], "counts": self.counts(params, shape)}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> DynamicViTReduction:
        layers = params["prune_layers"]
        return DynamicViTReduction(shape.dim, layers, self.counts(params, shape))
