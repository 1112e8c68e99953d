"""RAJNI, training-free pruning by centred values and class attention, its keep ratio set block by
block from how sensitive the class token is (formulas as in RAJNI's published README and code).

The published code averages the decision over the batch and keeps the same patches in every image;
here each image has its own. `budget="calibrated"` freezes the counts found on calibration images
(static shapes, exportable); `budget="image"` lets every image decide, padded in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.method import (
    PUBLISHED_PATCHES,
    Method,
    Paper,
    Preset,
    batches,
    register,
)
from vitpareto.methods.engine.parameters import Choice, Counts, Float, Int, Layers
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.staged import pruned_blocks
from vitpareto.methods.engine.tokens import Tokens, check_layers, keep, keep_padded, top_k
from vitpareto.methods.engine.vit import Attended, Reduction, _Reduced


@dataclass(frozen=True)
class Reading:
    """What RAJNI reads off one block: rho [B], eta [B], importance [B, n] (0 for padding)."""

    rho: Tensor
    eta: Tensor
    importance: Tensor


def read(tokens: Tokens, attended: Attended, score: str) -> Reading:
    """Sensitivity rho, mass eta and the patches' importance, from one block's attention and values.

    Without a class token the patch queries stand in for it: rho is 1 + the mean over them of
    self-attention times value norm.
    """
    prefix, valid = tokens.prefix, tokens.valid
    value = attended.v.mean(dim=1)
    norms = value.norm(dim=-1)
    if attended.class_token:
        heads = attended.class_row()
        row = heads.mean(dim=1)
        rho = 1 + row[:, 0] * norms[:, 0]
    else:
        heads, own = attended.patch_rows()
        row = heads.mean(dim=1)
        rho = 1 + masked_mean(own.mean(dim=1) * norms[:, prefix:], valid)
    if score == "jacobian":
        importance = (heads[..., prefix:] * attended.v[:, :, prefix:].norm(dim=-1)).sum(dim=1)
    else:
        patches = value[:, prefix:]
        weight = None if valid is None else valid.to(patches.dtype)[..., None]
        if weight is None:
            centre = patches.mean(dim=1, keepdim=True)
        else:
            centre = (patches * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True)
        length = (patches - centre).norm(dim=-1)
        mean = masked_mean(length, valid)[:, None]
        z = (length - mean) / (masked_std(length, valid)[:, None] + 1e-6)
        importance = row[:, prefix:] * z.relu()
    if valid is not None:
        importance = importance.masked_fill(~valid, 0.0)
    return Reading(rho, importance.sum(dim=1), importance)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid entries of values [B, n]: [B]."""
    if valid is None:
        return values.mean(dim=1)
    return values.masked_fill(~valid, 0.0).sum(dim=1) / valid.sum(dim=1)


def masked_std(values: Tensor, valid: Tensor | None) -> Tensor:
    """Unbiased standard deviation over the valid entries of values [B, n]: [B]."""
    if valid is None:
        return values.std(dim=1)
    off = (values - masked_mean(values, valid)[:, None]).masked_fill(~valid, 0.0)
    return (off.square().sum(dim=1) / (valid.sum(dim=1) - 1)).sqrt()


def keep_ratio(rho: Tensor, eta: Tensor, before: Tensor, gamma: float) -> Tensor:
    """min(1, clamp(rho * eta / (eta_prev + 1e-6), 0.25, 4) ** -gamma), elementwise."""
    return (rho * eta / (before + 1e-6)).clamp(0.25, 4.0).pow(-gamma).clamp(max=1.0)


def ranking(importance: Tensor) -> Tensor:
    """Importance with its zeros (about half, from the relu) ordered by position, lowest first.

    Every runtime and every padding then picks the same patches; a plain top-k breaks ties at will.
    """
    # at least float32: bfloat16 has no whole numbers of its own above 256
    importance = importance.to(torch.promote_types(importance.dtype, torch.float32))
    place = torch.arange(importance.shape[1], device=importance.device, dtype=importance.dtype)
    return torch.where(importance > 0, importance, -(place + 1))


class RajniReduction(Reduction):
    """counts: frozen patches after each block, or None: each image finds its own at `layers`.

    Figures of a trace: rho, eta and keep_ratio [B], an image's the same in every batch. Where
    counts are frozen: at the blocks that drop, keep_ratio as the counts have it. Otherwise at every
    one of `layers`: what the image asks for, before `min_tokens` and rounding, and NaN once it has
    no more than `min_tokens` patches, where nothing is read of it any more.
    """

    site = "after-block"

    def __init__(
        self,
        score: str,
        counts: tuple[int, ...] | None,
        gamma: float,
        min_tokens: int,
        layers: tuple[int, ...],
    ):
        super().__init__()
        self.score, self.counts = score, counts
        self.gamma, self.min_tokens, self.layers = gamma, min_tokens, layers

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Reading | None:
        if self.counts is not None:
            reads = self.counts[block] < tokens.patches
        else:
            reads = block in self.layers and int(tokens.counts().max()) > (
                self.min_tokens + tokens.prefix
            )
        return read(tokens, attended, self.score) if reads else None

    def reduce(self, block: int, tokens: Tokens, seen: Reading | None) -> Tokens:
        if seen is None:
            if self.counts is not None or block not in self.layers:
                return tokens
            unread = tokens.x.new_full((tokens.x.shape[0],), float("nan"))
            return replace(tokens, figures={"rho": unread, "eta": unread, "keep_ratio": unread})
        if self.counts is not None:
            count = self.counts[block]
            ratio = torch.full_like(seen.eta, count / tokens.patches)
            figures = {"rho": seen.rho, "eta": seen.eta, "keep_ratio": ratio}
            tokens = replace(tokens, figures=figures)
            return keep(tokens, top_k(ranking(seen.importance), count))
        return self._reduce_by_image(tokens, seen)

    def _reduce_by_image(self, tokens: Tokens, found: Reading) -> Tokens:
        n = tokens.counts() - tokens.prefix
        active = n > self.min_tokens
        before = tokens.per_image.get("eta")
        ratio = torch.ones_like(found.eta)
        if before is not None:
            ratio = keep_ratio(found.rho, found.eta, before, self.gamma)
        eta = found.eta if before is None else torch.where(active, found.eta, before)
        figures = {"rho": found.rho, "eta": found.eta, "keep_ratio": ratio}
        tokens = replace(
            tokens,
            per_image={**tokens.per_image, "eta": eta},
            # of an image that takes no part any more nothing would be read were it alone
            figures={k: v.masked_fill(~active, float("nan")) for k, v in figures.items()},
        )
        # at least float32: n times 1 must be n in every dtype of the model
        exact = torch.promote_types(ratio.dtype, torch.float32)
        wanted = (n.to(exact) * ratio.to(exact)).to(torch.int64).clamp(min=self.min_tokens)
        wanted = torch.where(active, torch.minimum(wanted, n), n)
        if bool((wanted == n).all()):
            return tokens
        return keep_padded(tokens, ranking(found.importance), wanted)


@register
class Rajni(Method):
    """Keeps the most important patches; how many follows from gamma and the class token."""

    name = "rajni"
    summary = "keep patches by class attention x centred values; count from the class's sensitivity"
    paper = Paper("RAJNI: training-free adaptive token pruning", "as published in RAJNI's README")
    site = "after-block"
    training = "calibration"
    parameters = (
        Float("gamma", "strength; 0 prunes nothing", low=0.0, high=10.0),
        Int("min_tokens", "patches below which nothing is dropped", low=1, high=4096),
        Choice("score", "standardized: published code; jacobian: the README's formula",
               default="standardized", choices=("standardized", "jacobian")),
        Choice("budget", "calibrated: counts frozen on calibration images; image: each its own",
               default="calibrated", choices=("calibrated", "image")),
        Layers("prune_layers", "blocks that take part; default: all", default=None),
        Counts("counts", "what calibration found: the patches left after each block"),
    )  # fmt: skip
    space = (
        Float("gamma", "strength", low=0.002, high=1.0, log=True),
        Float("min_tokens_fraction", "floor, as a fraction of the patches", low=0.02, high=0.5,
              log=True),
        Choice("score", "", choices=("standardized", "jacobian")),
        Float("last", "last block that prunes, as a fraction of the depth", low=0.25, high=1.0),
    )  # fmt: skip
    presets = tuple(
        Preset(
            f"gamma={g:g}",
            {
                "gamma": g,
                "min_tokens_fraction": 16 / PUBLISHED_PATCHES,
                "score": "standardized",
                "last": 1.0,
            },
            "RAJNI README",
        )
        for g in (0.01, 0.02, 0.05)
    )
    identity = {"gamma": 0.0, "min_tokens": 1, "budget": "image"}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        last = max(1, round(choices["last"] * shape.depth) - 1)
        return {
            "gamma": float(f"{choices['gamma']:.4g}"),
            "min_tokens": max(1, round(choices["min_tokens_fraction"] * shape.patches)),
            "score": choices["score"],
            "prune_layers": None if last >= shape.depth - 1 else tuple(range(last + 1)),
        }

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        check_layers(shape.depth, params.get("prune_layers") or (), self.name)
        if params.get("min_tokens") is not None and params["min_tokens"] > shape.patches:
            raise BadInput(
                f"rajni.min_tokens is {params['min_tokens']}: the model has {shape.patches} patches"
            )
        if params["budget"] == "image" and params.get("counts") is not None:
            raise BadInput("rajni.counts is for budget=calibrated: with budget=image each image "
                           "finds its own")  # fmt: skip

    def _layers(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        layers = params.get("prune_layers")
        return tuple(range(shape.depth)) if layers is None else layers

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...] | None:
        if params.get("counts") is not None:
            return params["counts"]
        nothing = params["gamma"] == 0 or len(self._layers(params, shape)) < 2
        return shape.dense_counts() if nothing else None

    def bounds(
        self, params: dict[str, Any], shape: ModelShape
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Fewest: every block after the first drops to 4^-gamma of its patches; most: none does."""
        known = self.counts(params, shape)
        if known is not None:
            return known, known
        n, low = shape.patches, []
        layers = self._layers(params, shape)
        for block in range(shape.depth):
            if block in layers[1:] and n > params["min_tokens"]:
                n = max(params["min_tokens"], int(n * 4.0 ** -params["gamma"]))
            low.append(n)
        return tuple(low), shape.dense_counts()

    def extra_macs(self, params: dict[str, Any], shape: ModelShape, counts: tuple[int, ...]) -> int:
        """The class row wherever it is read: blocks that reduce, or all that could."""
        if params["budget"] == "calibrated":
            return sum(shape.row_macs(b, n) for b, n in pruned_blocks(counts, shape))
        before = (shape.patches, *counts[:-1])
        layers = self._layers(params, shape)
        return sum(
            shape.row_macs(b, n)
            for b, n in enumerate(before)
            if b in layers and n > params["min_tokens"]
        )

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        if params.get("counts") is not None:
            return {"counts": params["counts"], "score": params["score"]}
        return {k: v for k, v in params.items() if k != "counts"}

    def needs_calibration(self, params: dict[str, Any]) -> bool:
        if params["budget"] == "image" or params.get("counts") is not None:
            return False
        return params["gamma"] > 0

    def refuses_export(self, params: dict[str, Any], shape: ModelShape) -> str:
        if self.counts(params, shape) is not None:
            return ""
        return (
            "decides for every image how many patches it keeps: no program of fixed shape is that "
            "model. Export one with budget=calibrated instead (the default: leave budget out, or "
            "measure the same recipe with it)"
        )

    def calibrate(
        self, model: nn.Module, params: dict[str, Any], images: Iterable[Tensor]
    ) -> dict[str, Any]:
        """Block after block, earlier blocks already pruned at their frozen counts: rho and eta are
        averaged over the calibration images, and the block's count follows and is frozen.
        """
        vit = cast(_Reduced, model)
        states = [vit.embed(batch) for part in images for batch in batches(part)]
        if not states:
            raise BadInput("rajni needs at least one calibration image, got none")
        depth, n = len(vit.blocks), states[0].patches
        layers = params["prune_layers"]
        layers = tuple(range(depth)) if layers is None else layers
        counts: list[int] = []
        before: float | None = None
        for block in range(depth):
            reads = block in layers and n > params["min_tokens"]
            found: list[Reading] = []

            def listen(_: int, tokens: Tokens, attended: Attended, found=found) -> None:
                found.append(read(tokens, attended, params["score"]))

            states = [vit.run_block(block, t, listen if reads else None) for t in states]
            if reads:
                rho = torch.cat([f.rho for f in found]).double().mean()
                eta = torch.cat([f.eta for f in found]).double().mean()
                if before is not None:
                    ratio = keep_ratio(rho, eta, torch.as_tensor(before).to(eta), params["gamma"])
                    count = min(n, max(params["min_tokens"], int(n * float(ratio))))
                    if count < n:
                        states = [
                            keep(tokens, top_k(ranking(f.importance), count))
                            for tokens, f in zip(states, found, strict=True)
                        ]
                        n = count
                before = float(eta)
            counts.append(n)
        return {**params, "counts": tuple(counts)}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> RajniReduction:
        counts = params.get("counts")
        if counts is None and params["budget"] == "calibrated":
            counts = self.counts(params, shape)
        if counts is not None:
            return RajniReduction(params["score"], counts, 0.0, 1, ())
        return RajniReduction(
            params["score"],
            None,
            params["gamma"],
            params["min_tokens"],
            self._layers(params, shape),
        )
