"""Schedules in closed form: where a method reduces and how many patches it leaves."""

from __future__ import annotations

from collections.abc import Sequence

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.shape import ModelShape


def check_layers(depth: int, layers: Sequence[int], where: str) -> None:
    """Raises BadInput if increasing block indices exceed the depth."""
    if layers and layers[-1] >= depth:
        raise BadInput(
            f"{where}.prune_layers must be block indices of the model, 0 to {depth - 1} "
            f"(got {layers[-1]})",
            Code.OUT_OF_RANGE,
            name="prune_layers",
            where=where,
            got=layers[-1],
            accepted=depth - 1,
        )


def staged_counts(
    depth: int, patches: int, layers: Sequence[int], rates: Sequence[float], where: str
) -> tuple[int, ...]:
    """Patches after each block if block layers[i] keeps int(n * rates[i]) of its n patches.

    Raises BadInput for a layer beyond the depth or a schedule that leaves no patch.
    """
    check_layers(depth, layers, where)
    at = dict(zip(layers, rates, strict=True))
    counts, n = [], patches
    for block in range(depth):
        if block in at:
            n = int(n * at[block])
            if n < 1:
                raise no_patch_left(
                    where,
                    block,
                    f"{patches} patches, prune_layers {tuple(layers)}, rates {tuple(rates)}",
                )
        counts.append(n)
    return tuple(counts)


def no_patch_left(where: str, block: int, setting: str) -> BadInput:
    """The error for a schedule that would drop the last patch. block: the first without patches."""
    return BadInput(
        f"{where} must leave at least one patch (none is left at block {block}: {setting})",
        Code.EMPTY,
        where=where,
        block=block,
    )


def scale_layers(depth: int, first: float, stages: int, spacing: float) -> tuple[int, ...]:
    """At most `stages` prune layers; `first` and `spacing` are fractions of the depth."""
    start = min(depth - 1, round(first * depth))
    step = max(1, round(spacing * depth))
    return tuple(range(start, depth, step))[:stages]


def pruned_blocks(
    counts: tuple[int, ...], shape: ModelShape, entering: int | None = None
) -> list[tuple[int, int]]:
    """(block, patches entering it) of every block at which a schedule reduces.

    entering: patches that enter block 0 (default: all).
    """
    before = (shape.patches if entering is None else entering, *counts[:-1])
    return [(b, n) for b, (n, after) in enumerate(zip(before, counts, strict=True)) if after < n]


def check_mergeable(counts: tuple[int, ...], shape: ModelShape, where: str) -> None:
    """Raises BadInput if a block would lose more than half of its patches: a matching of even with
    odd positions merges no more.
    """
    for block, n in pruned_blocks(counts, shape):
        if n - counts[block] > n // 2:
            raise BadInput(
                f"{where}.counts must not reduce the {n} patches of block {block} by more than "
                f"{n // 2}, half of them (got {n - counts[block]})",
                Code.OUT_OF_RANGE,
                name="counts",
                where=where,
                block=block,
                got=n - counts[block],
                accepted=n // 2,
            )
