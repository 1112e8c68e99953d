"""RAJNI's declaration, schedule bounds, cost and calibration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.forward import ReducedForward
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import PUBLISHED_PATCHES, Paper, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Choice, Counts, Float, Int, Layers
from vitpareto.methods.engine.schedules import check_layers, pruned_blocks
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.tokens import Tokens, keep, top_k
from vitpareto.methods.token.rajni.rajni_reduction import RajniReduction
from vitpareto.methods.token.rajni.scores import Reading, keep_ratio, ranking, read


@register
class Rajni(Method):
    """Keeps the most important patches; their number follows from gamma and the class token."""

    name = "rajni"
    summary = "keep patches by class attention times centred values; counts from sensitivity"
    paper = Paper("RAJNI: training-free adaptive token pruning", "as published in RAJNI's README")
    site = "after-block"
    training = "calibration"
    parameters = (
        Float("gamma", "strength; 0 prunes nothing", low=0.0, high=10.0),
        Int("min_tokens", "patches at or below which nothing is dropped", low=1, high=4096),
        Choice("score", "standardized: published code; jacobian: formula of the README",
               default="standardized", choices=("standardized", "jacobian")),
        Choice("budget", "calibrated: counts frozen on calibration images; image: per image",
               default="calibrated", choices=("calibrated", "image")),
        Layers("prune_layers", "blocks that reduce; default: all", default=None),
        Counts("counts", "outcome of calibration: patches left after each block"),
    )  # fmt: skip
    space = (
        Float("gamma", "strength", low=0.002, high=1.0, log=True),
        Float("min_tokens_fraction", "min_tokens, as a fraction of the patches", low=0.02, high=0.5,
              log=True),
        Choice("score", "importance score", choices=("standardized", "jacobian")),
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
                f"rajni.min_tokens must be at most the model's {shape.patches} patches "
                f"(got {params['min_tokens']})",
                Code.OUT_OF_RANGE,
                name="min_tokens",
                where="rajni",
                got=params["min_tokens"],
                accepted=shape.patches,
            )
        if params["budget"] == "image" and params.get("counts") is not None:
            raise BadInput(
                "rajni.counts must not be given with budget=image, which finds them per image",
                Code.CONFLICT,
                name="counts",
                where="rajni",
                excludes=["budget=image"],
            )

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
        """At least 4^-gamma of the patches in every block after the first; at most all."""
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
        """The class row where it is read: in blocks that reduce, or per image in all that may."""
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
            "decides the number of patches per image, which has no fixed shapes; export the same "
            "recipe with budget=calibrated (the default) instead"
        )

    def calibrate(
        self, model: nn.Module, params: dict[str, Any], images: Iterable[Tensor]
    ) -> dict[str, Any]:
        """The parameters with frozen counts.

        Block by block, with earlier blocks pruned at their frozen counts, rho and eta are averaged
        over the calibration images; the block's count follows from them.
        """
        vit = cast(ReducedForward, model)
        states = [vit.embed(batch) for part in images for batch in torch.split(part, 64)]
        if not states:
            raise BadInput(
                "calibration= must have at least one image (got none)",
                Code.EMPTY,
                name="calibration",
                where="rajni",
            )
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
