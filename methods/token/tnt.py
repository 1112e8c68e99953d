"""TNT, Training Noise Token (Rao, Jiang and Moyer, "Training Noise Token Pruning", 2024,
arXiv:2411.18092): keeps the patches to which linear heads, one a block, learned to give least
noise. Not timm's Transformer-iN-Transformer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.method import (
    PUBLISHED_DEPTH,
    PUBLISHED_PATCHES,
    Method,
    Paper,
    Preset,
)
from vitpareto.methods.engine.parameters import Float, Int, Layers, Rates
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.registry import register
from vitpareto.methods.engine.schedules import staged_counts
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import check_one_a_layer, chosen_layers, pruned_blocks
from vitpareto.methods.engine.tokens import Tokens, gather, keep, top_k

#: of 12: the noise of training comes after the first blocks alone, and trains their heads
PUBLISHED_NOISY = 5


def noisy_blocks(depth: int) -> int:
    """After how many blocks, from the first, training adds noise: 5 of 12, rounded up."""
    return -(-depth * PUBLISHED_NOISY // PUBLISHED_DEPTH)


def distinct(patches: Tensor, drop: int) -> Tensor:
    """Indices [B, m - drop], unordered, of patches [B, m, C] without the `drop` most redundant.

    Set A is the first m // 2 even positions, B all others; dropped are those of A with the highest
    cosine similarity to any of B. The published code splits at random, a batch at a time; by
    position an image's result is always the same.
    """
    m = patches.shape[1]
    half = m // 2
    place = torch.arange(m, device=patches.device)
    others = torch.cat([place[1 : 2 * half : 2], place[2 * half :]])
    unit = patches / patches.norm(dim=-1, keepdim=True)
    a, b = unit[:, : 2 * half : 2], unit[:, others]
    alike = (a @ b.transpose(-1, -2)).amax(dim=-1)
    rest = (-alike).topk(half - drop, dim=1, sorted=False).indices * 2
    return torch.cat([rest, others.expand(patches.shape[0], -1)], dim=1)


class TNTReduction(Reduction):
    """counts: patches left after each block, of `entering` before block 0 (the rest are dropped
    there as similar). `similar`: dropped as such at each layer that reduces.

    A head for every block is held, whatever the schedule: one training serves them all. In training
    nothing is dropped: after each of the first `noisy` blocks a patch gets noise from N(0, I) times
    `base_rate * (1 - alpha)`, alpha being the softmax of the block's head over the patches. Where
    no layer drops any there is no noise: the identity is dense in training too.

    `renormalise`: a LayerNorm (without weights) before the noise, as the published code has one in
    training alone.
    """

    site = "after-block"
    base_rate = 0.02
    renormalise = False

    def __init__(self, dim: int, counts: tuple[int, ...], entering: int, similar: int):
        super().__init__()
        self.counts, self.entering, self.similar = counts, entering, similar
        # a recipe by hand may reduce later than any that a search chooses: its heads train too
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
            return self._noised(block, tokens)
        count = self.counts[block]
        if count >= tokens.patches:
            return tokens
        patches = tokens.x[:, tokens.prefix :]
        # alpha is its softmax over patches, which has the same order
        score = self.heads[block](patches).squeeze(-1)
        if self.similar == 0:
            return keep(tokens, top_k(score, count))
        # A and B alternate in falling order of alpha
        index = score.topk(count + self.similar, dim=1).indices
        index = index.gather(1, distinct(gather(patches, index), self.similar))
        return keep(tokens, index.sort(dim=1).values)

    def _noised(self, block: int, tokens: Tokens) -> Tokens:
        if block >= self.noisy or self.counts[-1] >= tokens.patches:
            return tokens
        patches = tokens.x[:, tokens.prefix :]
        alpha = self.heads[block](patches).softmax(dim=1)
        # not randn_like: it would draw in the order of the patches' memory
        drawn = torch.randn(patches.shape, dtype=patches.dtype, device=patches.device)
        noise = self.base_rate * (1 - alpha) * drawn
        x = F.layer_norm(tokens.x, tokens.x.shape[-1:]) if self.renormalise else tokens.x
        noise = torch.cat([torch.zeros_like(x[:, : tokens.prefix]), noise.to(x.dtype)], dim=1)
        return replace(tokens, x=x + noise)


@register
class TNT(Method):
    """After block prune_layers[i] the `int(n * keep_rates[i])` patches of highest alpha stay."""

    name = "tnt"
    summary = "keep the patches that a linear head, trained with noise, finds relevant"
    paper = Paper(
        "Training Noise Token Pruning",
        "Rao, Jiang, Moyer",
        2024,
        "https://arxiv.org/abs/2411.18092",
    )
    site = "after-block"
    training = "required"
    trained_once = True
    parameters = (
        Layers("prune_layers", "blocks after which patches are dropped"),
        Rates("keep_rates", "fraction of the current patches kept at each"),
        Int("similarity_prune", "patches dropped as similar to others: with one prune layer from "
            "the best there (as many more are taken first), with several before block 0",
            default=0, low=0, high=4096),
    )  # fmt: skip
    space = (
        Float("keep_rate", "fraction kept at each prune layer", low=0.2, high=0.95),
        # of the blocks that one training serves
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
            "TNT's README, several layers",
        ),
    )  # fmt: skip
    identity = {"prune_layers": (), "keep_rates": ()}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        most, n = noisy_blocks(shape.depth), shape.patches
        first = min(choices["first"], (most - 1) / shape.depth)
        layers = chosen_layers({**choices, "first": first}, shape)
        layers = tuple(block for block in layers if block < most)
        rate, wanted = round(choices["keep_rate"], 4), round(choices["similar"] * n)
        # the last stages go where they would leave no patch on this model
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
        """The highest similarity_prune: what can be taken besides those kept, and is in set A."""
        if len(rates) == 1:
            kept = int(patches * rates[0])
            return min(kept, patches - kept)
        return patches // 2 if rates else 0

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        checked = super().check(params)
        check_one_a_layer(checked, "keep_rates", self.name)
        return checked if shape is None else super().check(checked, shape)

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        rates, similar = params["keep_rates"], params["similarity_prune"]
        most = self._similar_limit(rates, shape.patches)
        if similar > most:
            raise BadInput(
                f"tnt.similarity_prune is {similar}: accepted is at most {most} with "
                f"{shape.patches} patches and keep_rates {list(rates)}"
            )
        super().check_shape(params, shape)

    def entering(self, params: dict[str, Any], shape: ModelShape) -> int:
        several = len(params["prune_layers"]) > 1
        return shape.patches - (params["similarity_prune"] if several else 0)

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        entering = self.entering(params, shape)
        layers, rates = params["prune_layers"], params["keep_rates"]
        return staged_counts(shape.depth, entering, layers, rates, self.name)

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """The heads, n C wherever patches are dropped, and the similarities, |A| |B| C."""
        entering, similar = self.entering(params, shape), params["similarity_prune"]
        pruned = pruned_blocks(counts, shape, entering)
        total = sum(n * shape.dim for _, n in pruned)
        if similar:
            several = entering < shape.patches
            m = shape.patches if several else counts[pruned[0][0]] + similar
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
