"""Block latency as a table: measured on one target over a grid of dimensions, and interpolated.

What a latency-aware NViT reads its Δlatency from (Yang et al., CVPR 2023, section 3.2): a function
of (embedding, heads, q/k width, v width, MLP width, tokens). A block is its two halves in turn,
attention and MLP, each measured alone with its norm and residual; stem, final norm and head are
measured over the embedding. A table holds for its target (device, runtime, dtype, batch, threads)
and is refused for any other.

Latency over tokens goes up in steps on many devices; `steps` holds a block of the model's own
widths at every number of tokens, so that a schedule can keep all that cost the same (`snap`).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

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
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.measure.cost import Clock, target_of

SCHEMA = 2
ATTENTION = ("embedding", "heads", "qk", "v", "tokens")
MLP = ("embedding", "mlp", "tokens")
REST = ("embedding",)
STEPS = ("tokens",)
POINTS, ROUNDS, WARMUP = 3, 20, 3
#: points of `steps` at the most; with more tokens than that not every number is measured
STEP_POINTS = 256
#: latencies that differ by less are one step
SAME_STEP = 0.01


@dataclass(frozen=True)
class Grid:
    """Milliseconds over a grid: `axes` name -> ascending points, `ms` one entry a combination."""

    axes: dict[str, tuple[int, ...]]
    ms: NDArray[np.float64]

    def at(self, where: Mapping[str, float]) -> float:
        """Multilinear between the grid's points, exact on them. UserError outside the grid."""
        values = self.ms
        for name, points in self.axes.items():
            value = where[name]
            if not points[0] <= value <= points[-1]:
                raise UserError(
                    f"the latency table goes from {name} {points[0]} to {points[-1]}: {value:g} "
                    "lies outside it"
                )
            upper = min(int(np.searchsorted(points, value)), len(points) - 1)
            if points[upper] == value:
                values = values[upper]
                continue
            low, high = points[upper - 1], points[upper]
            share = (value - low) / (high - low)
            values = (1 - share) * values[upper - 1] + share * values[upper]
        return float(values)

    def plain(self) -> dict[str, Any]:
        return {"axes": {k: list(v) for k, v in self.axes.items()}, "ms": self.ms.tolist()}

    @classmethod
    def of(cls, data: Any, names: Sequence[str]) -> Grid:
        """From what `plain` gave; ValueError where it is not a grid over these axes."""
        axes = {k: tuple(int(p) for p in v) for k, v in data["axes"].items()}
        ms = np.asarray(data["ms"], dtype=np.float64)
        rising = all(all(a < b for a, b in itertools.pairwise(p)) for p in axes.values())
        if tuple(axes) != tuple(names) or ms.shape != tuple(map(len, axes.values())) or not rising:
            raise ValueError(f"a grid over {', '.join(names)} is wanted, got {list(axes)}")
        if not np.isfinite(ms).all() or (ms <= 0).any():
            raise ValueError("a latency is not a positive number")
        return cls(axes, ms)


@dataclass(frozen=True)
class Profile:
    """A latency table and what it holds for (`search.measure.cost.target_of`'s words)."""

    model: str
    target: dict[str, Any]
    attention: Grid
    mlp: Grid
    rest: Grid
    #: one whole block of the model's own widths over tokens; None in a table of before it was kept
    steps: Grid | None = None

    def snap(self, tokens: int) -> int:
        """The most tokens (prefix included) that cost a block no more than `tokens` do, to 1 %: the
        end of their step. UserError where the table has no steps; beyond it, `tokens` themselves.
        """
        if self.steps is None:
            raise UserError(
                f"the latency table of {self.model} has no steps over tokens: an earlier version "
                "wrote it; measure it again: vitpareto profile"
            )
        points = np.asarray(self.steps.axes["tokens"])
        if not points[0] <= tokens <= points[-1]:
            return tokens
        above = points >= tokens
        within = self.steps.ms <= (1 + SAME_STEP) * self.steps.at({"tokens": tokens})
        fitting = points[above & within]
        return max(tokens, int(fitting.max(initial=tokens)))

    def block_ms(self, embedding: int, block: BlockWidths, tokens: int) -> float:
        """One block on a batch of the target's size; tokens: prefix included."""
        where = {
            "embedding": embedding, "heads": block.heads, "qk": block.qk, "v": block.v,
            "mlp": block.mlp, "tokens": tokens,
        }  # fmt: skip
        return self.attention.at(where) + self.mlp.at(where)

    def cost(self, tokens: int) -> Callable[[Widths], float]:
        """Widths -> milliseconds a batch of the whole model, at `tokens` tokens in every block.

        A search asks for thousands that differ in one block: each block is looked up once.
        """
        block_ms = functools.lru_cache(maxsize=None)(
            lambda embedding, block: self.block_ms(embedding, block, tokens)
        )

        def milliseconds(widths: Widths) -> float:
            rest = self.rest.at({"embedding": widths.embedding})
            return rest + sum(block_ms(widths.embedding, block) for block in widths.blocks)

        return milliseconds

    def check(self, target: Mapping[str, Any], model: nn.Module) -> None:
        """UserError unless it was measured on this target and reaches this model's dimensions."""
        words = [k for k in {**self.target, **target} if self.target.get(k) != target.get(k)]
        if words:
            said = ", ".join(f"{k} {self.target.get(k)} and not {target.get(k)}" for k in words)
            raise UserError(
                f"the latency table of {self.model} is for another target: it was measured with "
                f"{said}; measure this one: vitpareto profile"
            )
        shape, widths = model_shape(model), model_widths(model)
        for block in widths.blocks:
            self.block_ms(widths.embedding, block, shape.patches + shape.prefix)
        self.rest.at({"embedding": widths.embedding})

    @property
    def digest(self) -> str:
        """16 hex digits of what it holds."""
        return hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode()).hexdigest()[:16]

    def plain(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "model": self.model, "target": self.target,
            "attention": self.attention.plain(), "mlp": self.mlp.plain(), "rest": self.rest.plain(),
            **({} if self.steps is None else {"steps": self.steps.plain()}),
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """UserError where it cannot be written."""
        try:
            write_atomic(path, json.dumps(self.plain(), indent=1))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Profile:
        """UserError where the file is not there, is no latency table, or is a newer version's."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] > SCHEMA:
                raise ValueError(f"it has schema {data['schema']}, this version reads {SCHEMA}")
            grids = [("attention", ATTENTION), ("mlp", MLP), ("rest", REST)]
            grids += [("steps", STEPS)] if "steps" in data else []
            made = {name: Grid.of(data[name], axes) for name, axes in grids}
            return cls(str(data["model"]), dict(data["target"]), **made)
        except OSError as error:
            raise UserError(f"latency table {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no latency table ({type(error).__name__}: {error}): accepted is what "
                "vitpareto profile wrote"
            ) from error


# ------------------------------------------------------------------------------------- measuring


def points_of(full: int, step: int, count: int, least: int | None = None) -> tuple[int, ...]:
    """`count` points, or fewer, from one step (or `least`) to `full`, evenly and on the steps."""
    least = min(step if least is None else least, full)
    steps = np.round(np.linspace(least, full, count) / step) * step
    inner = [int(p) for p in steps if least < p < full]
    return tuple(sorted({least, full, *inner}))


def measure_profile(
    model: nn.Module,
    name: str,
    *,
    batch: int,
    device: str,
    dtype: torch.dtype,
    points: int = POINTS,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Measure a model's table: every grid point is a real block of these widths on random tokens.

    points: how many on each axis, from one group of what NViT cuts to the model's own; dimensions
    that cannot be cut (`methods.slicing.sliced_model.fixed`) have one. Each entry is the median of
    `rounds` calls after a warm-up. `progress` hears (entries done, entries in all).
    """
    if points < 2 or rounds < 1:
        raise UserError(
            f"a latency table needs 2 points or more and a round, got {points}, {rounds}"
        )
    widths, shape = model_widths(model), model_shape(model)
    cut = fixed(model)
    full = {"embedding": widths.embedding}
    full |= {k: max(getattr(b, k) for b in widths.blocks) for k in ("heads", "qk", "v", "mlp")}
    axes = {k: (v,) if k in cut else points_of(v, GROUPS[k], points) for k, v in full.items()}
    most = shape.patches + shape.prefix
    axes["tokens"] = points_of(most, 1, points, least=shape.prefix + 1)
    clock = _Stopwatch(torch.device(device), dtype, batch, rounds)
    bench = _Bench(model, widths, clock)
    stride = -(-most // STEP_POINTS)
    walk = (*range(shape.prefix + 1, most, stride), most)
    jobs = (("attention", ATTENTION), ("mlp", MLP), ("rest", REST))
    total = 2 * len(walk) + sum(int(np.prod([len(axes[a]) for a in names])) for _, names in jobs)
    done, grids = 0, {}
    for half, names in jobs:
        own = {a: axes[a] for a in names}
        found = []
        for place in itertools.product(*own.values()):
            found.append(
                bench.milliseconds(
                    half, {**full, "tokens": most} | dict(zip(own, place, strict=True))
                )
            )
            done += 1
            if progress is not None:
                progress(done, total)
        grids[half] = Grid(own, np.reshape(found, [len(v) for v in own.values()]))
    whole = []
    for n in walk:
        whole.append(
            sum(bench.milliseconds(h, {**full, "tokens": n}) for h in ("attention", "mlp"))
        )
        done += 2
        if progress is not None:
            progress(done, total)
    grids["steps"] = Grid({"tokens": walk}, np.asarray(whole))
    images = torch.empty(batch, 3, *shape.image, device=device, dtype=dtype)
    return Profile(name, target_of(images), **grids)


@dataclass(frozen=True)
class _Stopwatch:
    """Times a call on random input of one kind."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    rounds: int

    @torch.inference_mode()
    def __call__(self, call: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
        x = torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)
        clock = Clock(x.is_cuda)
        for _ in range(WARMUP):
            call(x)
        return float(np.median([clock(lambda: call(x)) for _ in range(self.rounds)]))


class _Bench:
    """Blocks of any widths, as they would be in the sliced model."""

    def __init__(self, model: nn.Module, widths: Widths, clock: _Stopwatch) -> None:
        one = copy.deepcopy(model)
        vit = cast(VisionTransformer, one)
        vit.blocks = nn.Sequential(vit.blocks[0])
        self.one, self.clock = one.to(clock.device, clock.dtype).eval(), clock

    def milliseconds(self, half: str, at: Mapping[str, int]) -> float:
        block = BlockWidths(at["heads"], at["qk"], at["v"], at["mlp"])
        made = cast(VisionTransformer, sliced_model(self.one, Widths(at["embedding"], (block,))))
        made = made.to(self.clock.device, self.clock.dtype).eval()
        for tensor in itertools.chain(made.parameters(), made.buffers()):
            if tensor.is_floating_point():  # what is empty may hold denormals, which cost time
                nn.init.normal_(tensor, std=0.02)
        first = cast(Block, made.blocks[0])
        if half == "attention":
            tokens = (at["tokens"], at["embedding"])
            return self.clock(lambda x: x + first.ls1(first.attn(first.norm1(x))), tokens)
        if half == "mlp":
            tokens = (at["tokens"], at["embedding"])
            return self.clock(lambda x: x + first.ls2(first.mlp(first.norm2(x))), tokens)
        made.blocks = nn.Sequential()
        return self.clock(made, (3, *model_shape(self.one).image))
