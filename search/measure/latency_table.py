"""Block latency as a table: measured on one target over a grid of dimensions, and interpolated.

NViT reads from it how much latency a removal saves (Yang et al., CVPR 2023, section 3.2). Latency
is a function of (embedding, heads, q/k width, v width, MLP width, tokens). The latency of a block
is the sum of its attention half and its MLP half, each measured with its norm and residual. Stem,
final norm and head are measured together, over the embedding. A table holds for its target only.

On many devices latency rises in steps as the number of tokens grows. `steps` is the latency of a
block with the model's own widths at each number of tokens; with it a schedule can keep as many
tokens as the same latency allows (`snap`).

`search.measure.block_timing` measures tables; this module stores, loads and reads them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitpareto.methods import Code
from vitpareto.methods.engine.shape import model_shape
from vitpareto.methods.slicing.sliced_model import BlockWidths, Widths, model_widths
from vitpareto.search.errors import BadInput, UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.measure.latency import LatencyTarget

SCHEMA = 2
ATTENTION = ("embedding", "heads", "qk", "v", "tokens")
MLP = ("embedding", "mlp", "tokens")
REST = ("embedding",)
STEPS = ("tokens",)
#: relative difference below which two latencies are on the same step
SAME_STEP = 0.01


@dataclass(frozen=True)
class Grid:
    """Milliseconds over a grid.

    `axes` maps a dimension to its ascending points; `ms` has one axis per dimension.
    """

    axes: dict[str, tuple[int, ...]]
    ms: NDArray[np.float64]

    def at(self, where: Mapping[str, float]) -> float:
        """Interpolate multilinearly; exact on grid points. Raises UserError outside the grid."""
        values = self.ms
        for name, points in self.axes.items():
            value = where[name]
            if not points[0] <= value <= points[-1]:
                raise UserError(
                    f"{name} must be between {points[0]} and {points[-1]}, the range of the "
                    f"latency table (got {value:g})",
                    Code.OUT_OF_RANGE,
                    name=name,
                    got=value,
                    low=points[0],
                    high=points[-1],
                )
            upper = min(int(np.searchsorted(points, value)), len(points) - 1)
            if points[upper] == value:
                values = values[upper]
                continue
            low, high = points[upper - 1], points[upper]
            share = (value - low) / (high - low)
            values = (1 - share) * values[upper - 1] + share * values[upper]
        return float(values)

    def to_json(self) -> dict[str, Any]:
        return {"axes": {k: list(v) for k, v in self.axes.items()}, "ms": self.ms.tolist()}

    @classmethod
    def from_json(cls, stored: Any, names: Sequence[str]) -> Grid:
        """The inverse of `to_json`.

        Raises BadInput unless it is a grid of positive numbers over the axes `names`, and KeyError,
        TypeError or ValueError for another structure.
        """
        axes = {k: tuple(int(p) for p in v) for k, v in stored["axes"].items()}
        ms = np.asarray(stored["ms"], dtype=np.float64)
        rising = all(all(a < b for a, b in itertools.pairwise(p)) for p in axes.values())
        if tuple(axes) != tuple(names) or ms.shape != tuple(map(len, axes.values())) or not rising:
            raise BadInput(
                f"a grid must have ascending points on the axes {', '.join(names)}, and a latency "
                f"for each (got the axes {', '.join(axes)} and latencies of shape {ms.shape})",
                Code.MISMATCH,
                name="axes",
                got=tuple(axes),
                expected=tuple(names),
            )
        valid = np.isfinite(ms) & (ms > 0)
        if not valid.all():
            raise BadInput(
                f"latencies must be positive numbers (got {ms[~valid][0]})",
                Code.OUT_OF_RANGE,
                name="ms",
                got=float(ms[~valid][0]),
            )
        return cls(axes, ms)


@dataclass(frozen=True)
class LatencyTable:
    """Latency of a model's blocks, and the target that it holds for.

    `steps` is one block of the model's own widths over tokens; None in a table of schema 1.
    """

    model: str
    target: LatencyTarget
    attention: Grid
    mlp: Grid
    rest: Grid
    steps: Grid | None = None

    def snap(self, tokens: int) -> int:
        """The most tokens, prefix included, with the same block latency as `tokens`, to 1 %.

        Returns `tokens` outside the table. Raises UserError if the table has no steps.
        """
        if self.steps is None:
            raise UserError(
                f"the latency table of {self.model} has no steps over tokens, because an earlier "
                "version wrote it: measure it again with vitpareto profile",
                Code.MISSING,
                name="steps",
                model=self.model,
            )
        points = np.asarray(self.steps.axes["tokens"])
        if not points[0] <= tokens <= points[-1]:
            return tokens
        above = points >= tokens
        within = self.steps.ms <= (1 + SAME_STEP) * self.steps.at({"tokens": tokens})
        same_step = points[above & within]
        return max(tokens, int(same_step.max(initial=tokens)))

    def block_ms(self, embedding: int, block: BlockWidths, tokens: int) -> float:
        """Milliseconds of one block per batch; tokens include the prefix."""
        where = {
            "embedding": embedding, "heads": block.heads, "qk": block.qk, "v": block.v,
            "mlp": block.mlp, "tokens": tokens,
        }  # fmt: skip
        return self.attention.at(where) + self.mlp.at(where)

    def cost(self, tokens: int) -> Callable[[Widths], float]:
        """A function from widths to milliseconds per batch, with `tokens` tokens in every block.

        A search evaluates thousands of widths that differ in one block, so blocks are cached.
        """
        block_ms = functools.lru_cache(maxsize=None)(
            lambda embedding, block: self.block_ms(embedding, block, tokens)
        )

        def milliseconds(widths: Widths) -> float:
            rest = self.rest.at({"embedding": widths.embedding})
            return rest + sum(block_ms(widths.embedding, block) for block in widths.blocks)

        return milliseconds

    def check(self, target: LatencyTarget, model: nn.Module) -> None:
        """Raise UserError unless the table holds for `target` and covers the model's dimensions."""
        measured, required = self.target.to_json(), target.to_json()
        differing = {
            key: (measured.get(key), required.get(key))
            for key in {**measured, **required}
            if measured.get(key) != required.get(key)
        }
        if differing:
            pairs = ", ".join(f"{k} {a} instead of {b}" for k, (a, b) in differing.items())
            raise UserError(
                f"the latency table of {self.model} was measured on another target "
                f"({pairs}); measure this target with vitpareto profile",
                Code.MISMATCH,
                model=self.model,
                keys=tuple(differing),
            )
        shape, widths = model_shape(model), model_widths(model)
        for block in widths.blocks:
            self.block_ms(widths.embedding, block, shape.patches + shape.prefix)
        self.rest.at({"embedding": widths.embedding})

    @property
    def digest(self) -> str:
        """16 hex digits of the hash of its contents."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "model": self.model, "target": self.target.to_json(),
            "attention": self.attention.to_json(), "mlp": self.mlp.to_json(),
            "rest": self.rest.to_json(),
            **({} if self.steps is None else {"steps": self.steps.to_json()}),
        }  # fmt: skip

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_json`.

        Raises BadInput for a later schema and for invalid grids, and KeyError, TypeError or
        ValueError for another structure.
        """
        if stored["schema"] > SCHEMA:
            raise BadInput(
                f"schema must be at most {SCHEMA} (got {stored['schema']})",
                Code.UNSUPPORTED,
                name="schema",
                got=stored["schema"],
                most=SCHEMA,
            )
        return cls(
            model=str(stored["model"]),
            target=LatencyTarget.from_json(stored["target"]),
            attention=Grid.from_json(stored["attention"], ATTENTION),
            mlp=Grid.from_json(stored["mlp"], MLP),
            rest=Grid.from_json(stored["rest"], REST),
            steps=Grid.from_json(stored["steps"], STEPS) if "steps" in stored else None,
        )

    def save(self, path: Path) -> None:
        """Write the table as JSON. Raises UserError if `path` cannot be written."""
        try:
            write_atomic(path, json.dumps(self.to_json(), indent=1))
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}", Code.UNWRITABLE, path=str(path)
            ) from error

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table that `save` wrote. Raises UserError if `path` is not a readable table."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(
                f"latency table {path} cannot be read: {error.strerror}",
                Code.UNREADABLE,
                path=str(path),
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} must be a latency table written by vitpareto profile "
                f"({type(error).__name__}: {error})",
                Code.UNREADABLE,
                path=str(path),
            ) from error
