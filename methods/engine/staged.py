"""The schedule of methods that keep `int(n * keep_rate)` patches at a few prune layers.

TopK, TRAM and the controls share it; each adds its score.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import PUBLISHED_DEPTH, Preset
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
    Counts("counts", "patches left after each block; replaces the other two"),
)  # fmt: skip

#: relative prune layers: the arguments of `scale_layers`
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
    """The published keep rates of 75 % and 50 % at every third block."""
    shared = {"first": 0.25, "stages": 3, "spacing": 0.25}
    return tuple(
        Preset(f"{round(100 * rate)}%", {"keep_rate": rate, **shared}, source)
        for rate in (0.75, 0.5)
    )


class StagedMethod(Method):
    """A token method with TopK's schedule. Subclasses add `reduction` and `extra_macs`."""

    parameters: ClassVar[tuple[Parameter, ...]] = STAGED_PARAMETERS
    space: ClassVar[tuple[Parameter, ...]] = STAGED_SPACE
    identity = {"keep_rate": 1.0, "prune_layers": ()}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        layers = chosen_layers(choices, shape)
        rate = round(choices["keep_rate"], 4)
        # on a small model a low rate would leave no patch in the last stages: drop these stages
        n, possible = shape.patches, 0
        for _ in layers:
            n = int(n * rate)
            possible += n >= 1
        return {"keep_rate": rate, "prune_layers": layers[:possible]}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        counts, others = params.get("counts"), {"keep_rate", "prune_layers"}
        if counts is not None and any(params.get(name) is not None for name in others):
            raise exclusive(self.name, "keep_rate", "prune_layers")
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
    """Keeps the patches with the highest scores at every block where the schedule reduces.

    counts: patches left after each block.
    """

    def __init__(self, counts: tuple[int, ...]):
        super().__init__()
        self.counts = counts

    def score(self, block: int, tokens: Tokens, attended: Attended) -> Tensor:
        """Scores of the patches [B, n]; the highest stay."""
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
    """The prune layers of choices from `LAYERS_SPACE` on a model of this shape."""
    spacing = choices.get("spacing", 0.0)
    return scale_layers(shape.depth, choices["first"], choices["stages"], spacing)


def check_one_per_layer(params: dict[str, Any], name: str, where: str) -> None:
    """Raises BadInput unless the list params[name] has one entry per prune layer."""
    values, layers = params[name], params["prune_layers"]
    if len(values) != len(layers):
        raise BadInput(
            f"{where}.{name} must have one entry per prune layer, {len(layers)} "
            f"(got {len(values)})",
            Code.MISMATCH,
            name=name,
            where=where,
            got=len(values),
            expected=len(layers),
        )


def exclusive(where: str, *names: str) -> BadInput:
    """The error for `counts` given together with the parameters that it replaces."""
    return BadInput(
        f"{where}.counts must not be given together with {' or '.join(names)}: it replaces them",
        Code.CONFLICT,
        name="counts",
        where=where,
        excludes=list(names),
    )
