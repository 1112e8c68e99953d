"""Schedules in closed form: where a method reduces and how many patches it leaves."""

from __future__ import annotations

from collections.abc import Sequence

from vitpareto.methods.engine.errors import BadInput


def check_layers(depth: int, layers: Sequence[int], where: str) -> None:
    """BadInput where rising block indices go beyond the depth."""
    if layers and layers[-1] >= depth:
        raise BadInput(
            f"{where}.prune_layers names block {layers[-1]}: the model's blocks are 0 to "
            f"{depth - 1}"
        )


def staged_counts(
    depth: int, patches: int, layers: Sequence[int], rates: Sequence[float], where: str
) -> tuple[int, ...]:
    """Patches after each block when block layers[i] keeps int(n * rates[i]) of its n patches.

    Raises BadInput for a layer outside the depth and for a schedule that leaves no patch.
    """
    check_layers(depth, layers, where)
    at = dict(zip(layers, rates, strict=True))
    counts, n = [], patches
    for block in range(depth):
        if block in at:
            n = int(n * at[block])
            if n < 1:
                raise BadInput(
                    f"{where} leaves no patch after block {block} "
                    f"({patches} patches, prune_layers {tuple(layers)}, rates {tuple(rates)})"
                )
        counts.append(n)
    return tuple(counts)


def scale_layers(depth: int, first: float, stages: int, spacing: float) -> tuple[int, ...]:
    """Relative choices -> prune layers: `first` and `spacing` are fractions of the depth."""
    start = min(depth - 1, round(first * depth))
    step = max(1, round(spacing * depth))
    return tuple(range(start, depth, step))[:stages]
