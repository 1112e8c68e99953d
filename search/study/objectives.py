"""The objectives of a search, with their units and directions.

Data only: it may not measure, read or write anything. Every other module takes names, units and
directions from this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError


@dataclass(frozen=True)
class Objective:
    """One axis of the search.

    Attributes:
        name: key in results, columns and metrics.
        unit: unit of the values, as column headers show it.
        direction: "maximize" or "minimize", as Optuna spells it.
        label: name in plots and tables.
    """

    name: str
    unit: str
    direction: Literal["maximize", "minimize"]
    label: str

    @property
    def sign(self) -> int:
        """+1 if less is better, -1 if more is better: `sign * value` is always minimized."""
        return 1 if self.direction == "minimize" else -1


#: All quantities that a trial can be compared by.
OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("top1", "%", "maximize", "top-1 accuracy"),
        Objective("top5", "%", "maximize", "top-5 accuracy"),
        Objective("gmacs", "G", "minimize", "GMACs per image"),
        Objective("params_m", "M", "minimize", "parameters"),
        Objective("latency_ms", "ms", "minimize", "latency per batch, p50"),
        Objective("images_per_s", "1/s", "maximize", "throughput"),
        Objective("peak_mb", "MB", "minimize", "peak memory"),
    )
}

#: The accuracies; every other objective is a cost.
ACCURACIES = ("top1", "top5")


def objectives_named(names: Sequence[str]) -> tuple[Objective, ...]:
    """Return the objectives of these names, in this order.

    Raises:
        UserError: a name is unknown or repeated.
    """
    for name in names:
        if name not in OBJECTIVES:
            raise UserError.unknown(
                f"objective {name!r} does not exist",
                name,
                OBJECTIVES,
                name=name,
            )
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise UserError(
            f"objectives must be unique (got {repeated[0]!r} more than once)",
            Code.DUPLICATE, name=repeated[0],
        )  # fmt: skip
    return tuple(OBJECTIVES[name] for name in names)


def axes_of(objectives: Sequence[Objective]) -> tuple[int, int]:
    """Return the indices of (accuracy, primary cost): the first objective of each kind.

    The first objective is used for both if one of the kinds is missing.
    """
    accuracies = [i for i, o in enumerate(objectives) if o.name in ACCURACIES]
    costs = [i for i, o in enumerate(objectives) if o.name not in ACCURACIES]
    return (accuracies or [0])[0], (costs or [0])[0]
