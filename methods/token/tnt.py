"""TNT, Training Noise Token (Rao, Jiang and Moyer, "Training Noise Token Pruning", 2024,
arXiv:2411.18092): keeps the patches for which linear heads, one per block, learned to add the least
noise. Unrelated to timm's Transformer-iN-Transformer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import (
    PUBLISHED_DEPTH,
    PUBLISHED_PATCHES,
    Paper,
    Preset,
)
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float, Int, Layers, Rates
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import pruned_blocks, staged_counts
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import check_one_per_layer, chosen_layers
from vitpareto.methods.engine.tokens import Tokens, gather, keep, top_k

#: the number of blocks of 12, from the first, after which training adds noise
PUBLISHED_NOISY = 5


def noisy_blocks(depth: int) -> int:
    """The number of blocks, from the first, after which training adds noise: 5/12, rounded up."""
    return -(-depth * PUBLISHED_NOISY // PUBLISHED_DEPTH)


def distinct(patches: Tensor, drop: int) -> Tensor:
    """Indices [B, m - drop], in no order, of patches [B, m, C] without the `drop` most redundant.

    Set A is the first m // 2 even positions, set B all others. The patches of A with the highest
    cosine similarity to any patch of B are dropped. The published code splits each batch at random;
    a split by position makes an image's result deterministic.
    """
    m = patches.shape[1]
    half = m // 2
    position = torch.arange(m, device=patches.device)
    others = torch.cat([position[1 : 2 * half : 2], position[2 * half :]])
    unit = patches / patches.norm(dim=-1, keepdim=True)
    a, b = unit[:, : 2 * half : 2], unit[:, others]
    similarity = (a @ b.transpose(-1, -2)).amax(dim=-1)
    rest = (-similarity).topk(half - drop, dim=1, sorted=False).indices * 2
    return torch.cat([rest, others.expand(patches.shape[0], -1)], dim=1)


class TNTReduction(Reduction):
    """Keeps the patches with the highest alpha, the softmax of a block's head over the patches.

    There is a head for every block whatever the schedule, so that one training serves all settings.
    In training nothing is dropped: after each of the first `noisy` blocks noise from N(0, I) times
    `base_rate * (1 - alpha)` is added to every patch. A setting that drops nothing adds no noise,
    so that the identity is dense in training too.

    Args:
        dim: width of the tokens.
        counts: patches left after each block.
        entering: patches that enter block 0; the others are dropped as similar before it.
        similar: patches dropped as similar at each block that reduces.

    Attributes:
        renormalise: apply a LayerNorm without weights before the noise, which the published code
            does in training only.
    """

    site = "after-block"
    base_rate = 0.02
    renormalise = False

    def __init__(self, dim: int, counts: tuple[int, ...], entering: int, similar: int):
        super().__init__()
        self.counts, self.entering, self.similar = counts, entering, similar
        # a recipe may reduce in later blocks than a search does; their heads are trained too
        before = (entering, *counts)
        last = max((b for b, n in enumerate(counts) if n < before[b]), default=-1)
        self.noisy = max(noisy_blocks(len(counts)), last + 1)
        heads = [nn.Linear(dim, 1) for _ in counts]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def begin(self, images: Tensor, tokens: Tokens) -> Tokens:
        drop = tokens.patches - self.entering
        if drop == 0 or self.training:
            return tokens
        index = distinct(tokens.x[:, tokens.prefix :], drop)
        return keep(tokens, index.sort(dim=1).values)

    def reduce(self, block: int, tokens: Tokens, seen: None) -> Tokens:
        if self.training:
            return self._add_noise(block, tokens)
        count = self.counts[block]
        if count >= tokens.patches:
            return tokens
        patches = tokens.x[:, tokens.prefix :]
        # alpha, the softmax of the score, has the same order
        score = self.heads[block](patches).squeeze(-1)
        if self.similar == 0:
            return keep(tokens, top_k(score, count))
        # A and B alternate in decreasing order of alpha
        index = score.topk(count + self.similar, dim=1).indices
        index = index.gather(1, distinct(gather(patches, index), self.similar))
        return keep(tokens, index.sort(dim=1).values)

    def _add_noise(self, block: int, tokens: Tokens) -> Tokens:
        if block >= self.noisy or self.counts[-1] >= tokens.patches:
            return tokens
        patches = tokens.x[:, tokens.prefix :]
        alpha = self.heads[block](patches).softmax(dim=1)
        # randn_like would fill the noise in the memory order of the patches
        drawn = torch.randn(patches.shape, dtype=patches.dtype, device=patches.device)
        noise = self.base_rate * (1 - alpha) * drawn
        x = F.layer_norm(tokens.x, tokens.x.shape[-1:]) if self.renormalise else tokens.x
        noise = torch.cat([torch.zeros_like(x[:, : tokens.prefix]), noise.to(x.dtype)], dim=1)
        return replace(tokens, x=x + noise)


@register
class TNT(Method):
    """After block prune_layers[i] the `int(n * keep_rates[i])` patches of highest alpha stay."""

    name = "tnt"
    summary = "keep the patches that linear heads, trained with noise, score highest"
    paper = Paper(
        "Training Noise Token Pruning",
        "Rao, Jiang, Moyer",
        2024,
        "https://arxiv.org/abs/2411.18092",
    )
    site = "after-block"
    training = "required"
    needs_preparation = True
    parameters = (
        Layers("prune_layers", "blocks after which patches are dropped"),
        Rates("keep_rates", "fractions of the current patches kept at each"),
        Int("similarity_prune", "patches dropped as similar to others: with one prune layer at "
            "that layer, with more before block 0", default=0, low=0, high=4096),
    )  # fmt: skip
    space = (
        Float("keep_rate", "fraction kept at each prune layer", low=0.2, high=0.95),
        # within the blocks whose heads one training serves
        Float("first", "first prune layer, as a fraction of the depth", low=0.0, high=1 / 3),
        Int("stages", "number of prune layers", low=1, high=4),
        Float("spacing", "blocks between prune layers, as a fraction of the depth",
              low=1 / 12, high=1 / 6, when=("stages", (2, 3, 4))),
        Float("similar", "similarity_prune, as a fraction of the model's patches",
              low=0.0, high=0.25),
    )  # fmt: skip
    presets = (
        Preset(
            "layer 2, 60%",
            {"keep_rate": 0.6, "first": 1 / 6, "stages": 1, "similar": 25 / PUBLISHED_PATCHES},
            "TNT's README, single layer",
        ),
        Preset(
            "layers 2, 3, 4, 80%",
            {"keep_rate": 0.8, "first": 1 / 6, "stages": 3, "spacing": 1 / 12,
             "similar": 40 / PUBLISHED_PATCHES},
            "TNT's README, three layers",
        ),
    )  # fmt: skip
    identity = {"prune_layers": (), "keep_rates": ()}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        most, n = noisy_blocks(shape.depth), shape.patches
        first = min(choices["first"], (most - 1) / shape.depth)
        layers = chosen_layers({**choices, "first": first}, shape)
        layers = tuple(block for block in layers if block < most)
        rate, wanted = round(choices["keep_rate"], 4), round(choices["similar"] * n)
        # on a small model the last stages may leave no patch: drop these stages
        for stages in range(len(layers), 0, -1):
            rates = (rate,) * stages
            similar = min(wanted, self._similar_limit(rates, n))
            left = n if stages == 1 else n - similar
            for _ in range(stages):
                left = int(left * rate)
            if left >= 1:
                return {
                    "prune_layers": layers[:stages],
                    "keep_rates": rates,
                    "similarity_prune": similar,
                }
        return {"prune_layers": (), "keep_rates": (), "similarity_prune": 0}

    @staticmethod
    def _similar_limit(rates: tuple[float, ...], patches: int) -> int:
        """The largest similarity_prune: limited by the patches that are not kept, and by set A."""
        if len(rates) == 1:
            kept = int(patches * rates[0])
            return min(kept, patches - kept)
        return patches // 2 if rates else 0

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        checked = super().check(params)
        check_one_per_layer(checked, "keep_rates", self.name)
        return checked if shape is None else super().check(checked, shape)

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        rates, similar = params["keep_rates"], params["similarity_prune"]
        most = self._similar_limit(rates, shape.patches)
        if similar > most:
            raise BadInput(
                f"tnt.similarity_prune must be at most {most} with {shape.patches} patches and "
                f"keep_rates {list(rates)} (got {similar})",
                Code.OUT_OF_RANGE,
                name="similarity_prune",
                where="tnt",
                got=similar,
                accepted=most,
            )
        super().check_shape(params, shape)

    def entering(self, params: dict[str, Any], shape: ModelShape) -> int:
        multi_stage = len(params["prune_layers"]) > 1
        return shape.patches - (params["similarity_prune"] if multi_stage else 0)

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        entering = self.entering(params, shape)
        layers, rates = params["prune_layers"], params["keep_rates"]
        return staged_counts(shape.depth, entering, layers, rates, self.name)

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """The heads, n C in blocks that drop, and the similarities, |A| |B| C."""
        entering, similar = self.entering(params, shape), params["similarity_prune"]
        pruned = pruned_blocks(counts, shape, entering)
        total = sum(n * shape.dim for _, n in pruned)
        if similar:
            before_blocks = entering < shape.patches
            m = shape.patches if before_blocks else counts[pruned[0][0]] + similar
            total += (m // 2) * (m - m // 2) * shape.dim
        return total

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        return {
            "entering": self.entering(params, shape),
            "counts": self.counts(params, shape),
            "similarity_prune": params["similarity_prune"],
        }

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> TNTReduction:
        entering = self.entering(params, shape)
        similar = params["similarity_prune"] if entering == shape.patches else 0
        return TNTReduction(shape.dim, self.counts(params, shape), entering, similar)
