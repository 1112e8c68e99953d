"""What the methods share that keep `int(n * keep_rate)` patches at a few prune layers.

TopK's schedule, and that of its controls: declared once here. A method adds its score.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.method import PUBLISHED_DEPTH, Method, Preset
from vitpareto.methods.engine.parameters import Counts, Float, Int, Layers, Parameter
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.schedules import scale_layers, staged_counts
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.tokens import Tokens, keep, top_k

#: every third block of 12
PUBLISHED_LAYERS = (3, 6, 9)

STAGED_PARAMETERS = (
    Float("keep_rate", "fraction of the current patches kept at each prune layer", low=0, high=1,
          open_low=True),
    Layers("prune_layers", "blocks that reduce; default: every quarter of the depth", default=None),
    Counts("counts", "instead of both: the patches left after each block"),
)  # fmt: skip

#: where a method reduces: what `scale_layers` takes
LAYERS_SPACE = (
    Float("first", "first prune layer, as a fraction of the depth", low=0.0, high=0.75),
    Int("stages", "number of prune layers", low=1, high=4),
    Float("spacing", "blocks between prune layers, as a fraction of the depth",
          low=1 / 12, high=1 / 3, when=("stages", (2, 3, 4))),
)  # fmt: skip

STAGED_SPACE = (
    Float("keep_rate", "fraction kept at each prune layer", low=0.2, high=0.95),
    *LAYERS_SPACE,
)


def staged_presets(source: str) -> tuple[Preset, ...]:
    """The published 75 % and 50 % at every third block."""
    shared = {"first": 0.25, "stages": 3, "spacing": 0.25}
    return tuple(
        Preset(f"{round(100 * rate)}%", {"keep_rate": rate, **shared}, source)
        for rate in (0.75, 0.5)
    )


class StagedMethod(Method):
    """A token method with TopK's schedule."""

    parameters: ClassVar[tuple[Parameter, ...]] = STAGED_PARAMETERS
    space: ClassVar[tuple[Parameter, ...]] = STAGED_SPACE
    identity = {"keep_rate": 1.0, "prune_layers": ()}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        layers = chosen_layers(choices, shape)
        rate = round(choices["keep_rate"], 4)
        # the last stages go where a low rate would leave no patch on this model
        n, possible = shape.patches, 0
        for _ in layers:
            n = int(n * rate)
            possible += n >= 1
        return {"keep_rate": rate, "prune_layers": layers[:possible]}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        counts, others = params.get("counts"), {"keep_rate", "prune_layers"}
        if counts is not None and any(params.get(name) is not None for name in others):
            raise BadInput(f"{self.name} takes counts or keep_rate and prune_layers, not both")
        checked = super().check(params)
        if shape is not None:
            if counts is None and checked["prune_layers"] is None:
                last = shape.depth - 1
                scaled = {
                    min(last, round(i * shape.depth / PUBLISHED_DEPTH)) for i in PUBLISHED_LAYERS
                }
                checked["prune_layers"] = tuple(sorted(scaled))
            checked = super().check(checked, shape)
        return checked

    def counts(self, params: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
        if params.get("counts") is not None:
            return params["counts"]
        layers = params["prune_layers"]
        rates = (params["keep_rate"],) * len(layers)
        return staged_counts(shape.depth, shape.patches, layers, rates, self.name)

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        own = {p.name for p in STAGED_PARAMETERS}
        rest = {k: v for k, v in params.items() if k not in own}
        return {"counts": self.counts(params, shape), **rest}


class StagedReduction(Reduction):
    """Keeps the highest-scored patches wherever the schedule has fewer than there are."""

    def __init__(self, counts: tuple[int, ...]):
        super().__init__()
        self.counts = counts

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        """What decides, [B, n]; higher stays."""
        raise NotImplementedError

    def observe(self, block: int, tokens: Tokens, attended: Attended) -> Tensor | None:
        if self.counts[block] >= tokens.patches:
            return None
        return self.score(block, tokens, attended)

    def reduce(self, block: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if seen is None:
            return tokens
        return keep(tokens, top_k(seen, self.counts[block]))


def chosen_layers(choices: dict[str, Any], shape: ModelShape) -> tuple[int, ...]:
    """The prune layers that choices from LAYERS_SPACE mean on a model of this shape."""
    spacing = choices.get("spacing", 0.0)
    return scale_layers(shape.depth, choices["first"], choices["stages"], spacing)


def check_one_a_layer(params: dict[str, Any], name: str, where: str) -> None:
    """BadInput unless the list params[name] has one entry a prune layer."""
    values, layers = params[name], params["prune_layers"]
    if len(values) != len(layers):
        raise BadInput(
            f"{where}.{name} has {len(values)} entries: prune_layers has {len(layers)}, accepted "
            "is one a prune layer"
        )


def pruned_blocks(
    counts: tuple[int, ...], shape: ModelShape, entering: int | None = None
) -> list[tuple[int, int]]:
    """(block, patches entering it) for every block at which a schedule reduces; `entering` patches
    enter block 0 (default: all).
    """
    before = (shape.patches if entering is None else entering, *counts[:-1])
    return [(b, n) for b, (n, after) in enumerate(zip(before, counts, strict=True)) if after < n]
