"""Measures the latency table of a model: every grid point is a real block on random tokens."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitpareto.methods import Code
from vitpareto.methods.engine.shape import model_shape
from vitpareto.methods.slicing.plan import GROUPS
from vitpareto.methods.slicing.sliced_model import (
    BlockWidths,
    Widths,
    fixed,
    model_widths,
    sliced_model,
)
from vitpareto.search.errors import UserError
from vitpareto.search.measure.latency_table import ATTENTION, MLP, REST, Grid, LatencyTable
from vitpareto.search.measure.timing import Clock, batch_target

POINTS, ROUNDS, WARMUP = 3, 20, 3
#: the largest number of points of `LatencyTable.steps`; beyond it token counts are skipped
STEP_POINTS = 256

#: called with (entries measured, entries in total)
Progress = Callable[[int, int], None]


def measure_latency_table(
    model: nn.Module,
    name: str,
    *,
    batch: int,
    device: str,
    dtype: torch.dtype,
    points: int = POINTS,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure the latency table of a model.

    Args:
        name: the model's name, stored in the table.
        batch: images per call.
        points: grid points per dimension, at least 2, from one group of what NViT removes to the
            model's own size. Dimensions that cannot be cut have one point.
        rounds: timed calls per entry, whose median is stored.
        progress: called with (entries measured, entries in total).

    Raises:
        UserError: `points` or `rounds` is too small.
    """
    _check_numbers(points, rounds)
    shape = model_shape(model)
    most = shape.patches + shape.prefix
    full, axes = _axes(model, points)
    stride = -(-most // STEP_POINTS)
    step_points = (*range(shape.prefix + 1, most, stride), most)
    grids = {
        part: {axis: axes[axis] for axis in names}
        for part, names in (("attention", ATTENTION), ("mlp", MLP), ("rest", REST))
    }
    count = _Count(sum(map(_entries, grids.values())) + 2 * len(step_points), progress)
    timer = _BlockTimer(model, torch.device(device), dtype, batch, rounds)
    full["tokens"] = most
    measured = {part: _measure_grid(timer, part, grid, full, count) for part, grid in grids.items()}
    steps = _measure_steps(timer, step_points, full, count)
    images = torch.empty(batch, 3, *shape.image, device=device, dtype=dtype)
    return LatencyTable(name, batch_target(images), **measured, steps=steps)


def _check_numbers(points: int, rounds: int) -> None:
    """Raise UserError if one of the numbers is too small for a table."""
    for key, value, least in (("points", points, 2), ("rounds", rounds, 1)):
        if value < least:
            raise UserError(
                f"{key} of a latency table must be at least {least} (got {value})",
                Code.OUT_OF_RANGE,
                name=key,
                got=value,
            )


def _entries(grid: Mapping[str, tuple[int, ...]]) -> int:
    """Number of points of a grid."""
    return math.prod(len(points) for points in grid.values())


def points_of(full: int, step: int, count: int, least: int | None = None) -> tuple[int, ...]:
    """At most `count` evenly spaced multiples of `step`, from `least` (default `step`) to `full`.

    Both ends are included, whether or not they are multiples.
    """
    least = min(step if least is None else least, full)
    steps = np.round(np.linspace(least, full, count) / step) * step
    inner = [int(p) for p in steps if least < p < full]
    return tuple(sorted({least, full, *inner}))


def _axes(model: nn.Module, points: int) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """The model's own dimensions, and the grid points of each, tokens included."""
    widths, shape, uncut = model_widths(model), model_shape(model), fixed(model)
    full = {"embedding": widths.embedding}
    full |= {k: max(getattr(b, k) for b in widths.blocks) for k in ("heads", "qk", "v", "mlp")}
    axes = {k: (v,) if k in uncut else points_of(v, GROUPS[k], points) for k, v in full.items()}
    most = shape.patches + shape.prefix
    axes["tokens"] = points_of(most, 1, points, least=shape.prefix + 1)
    return full, axes


@dataclass
class _Count:
    """Counts measured entries and reports them."""

    total: int
    progress: Progress | None
    done: int = 0

    def add(self, entries: int) -> None:
        """Count and report measured entries."""
        self.done += entries
        if self.progress is not None:
            self.progress(self.done, self.total)


class _BlockTimer:
    """Times parts of a one-block model at given widths, as they would be in the sliced model."""

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, batch: int, rounds: int
    ) -> None:
        one_block = copy.deepcopy(model)
        vit = cast(VisionTransformer, one_block)
        vit.blocks = nn.Sequential(vit.blocks[0])
        self.model = one_block.to(device, dtype).eval()
        self.device, self.dtype, self.batch, self.rounds = device, dtype, batch, rounds

    def milliseconds(self, part: str, dimensions: Mapping[str, int]) -> float:
        """Median of one part: "attention" or "mlp" of a block, or "rest" (stem, norm and head)."""
        d = dimensions
        block = BlockWidths(d["heads"], d["qk"], d["v"], d["mlp"])
        sliced = sliced_model(self.model, Widths(d["embedding"], (block,)))
        vit = cast(VisionTransformer, sliced).to(self.device, self.dtype).eval()
        for tensor in itertools.chain(vit.parameters(), vit.buffers()):
            # uninitialised memory may hold denormals, which are slow on CPUs
            if tensor.is_floating_point():
                nn.init.normal_(tensor, std=0.02)
        first = cast(Block, vit.blocks[0])
        tokens = (d["tokens"], d["embedding"])
        if part == "attention":
            return self._median(lambda x: x + first.ls1(first.attn(first.norm1(x))), tokens)
        if part == "mlp":
            return self._median(lambda x: x + first.ls2(first.mlp(first.norm2(x))), tokens)
        vit.blocks = nn.Sequential()
        return self._median(vit, (3, *model_shape(self.model).image))

    @torch.inference_mode()
    def _median(self, call: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
        """Median milliseconds of a call on random input [batch, *shape]."""
        x = torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)
        clock = Clock(x.is_cuda)
        for _ in range(WARMUP):
            call(x)
        return float(np.median([clock(lambda: call(x)) for _ in range(self.rounds)]))


def _measure_grid(
    timer: _BlockTimer,
    part: str,
    grid: dict[str, tuple[int, ...]],
    full: Mapping[str, int],
    count: _Count,
) -> Grid:
    """Every point of a part's grid; dimensions that it does not have are as in `full`."""
    ms = []
    for point in itertools.product(*grid.values()):
        ms.append(timer.milliseconds(part, {**full, **dict(zip(grid, point, strict=True))}))
        count.add(1)
    return Grid(grid, np.reshape(ms, [len(points) for points in grid.values()]))


def _measure_steps(
    timer: _BlockTimer, tokens: tuple[int, ...], full: Mapping[str, int], count: _Count
) -> Grid:
    """A whole block of the model's own widths at each number of tokens."""
    ms = []
    for number in tokens:
        dimensions = {**full, "tokens": number}
        ms.append(sum(timer.milliseconds(half, dimensions) for half in ("attention", "mlp")))
        count.add(2)
    return Grid({"tokens": tokens}, np.asarray(ms))
