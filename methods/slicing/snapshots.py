"""Snapshots of a pruning trajectory: the weights and widths at each target of a structural method.

Plain records and the arithmetic of targets and rounds; no model runs here.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.preparation import PreparationOutcome
from vitpareto.methods.slicing.plan import Cost, check_reachable, macs_cost
from vitpareto.methods.slicing.sliced_model import Widths, fixed, model_widths


@dataclass(frozen=True)
class Snapshot:
    """The model where its cost first met a target.

    Attributes:
        target: fraction of the dense model's cost that was asked for.
        weights: digest of the state dict.
        widths: the model's dimensions.
        reached: fraction of the dense model's cost that is left.
    """

    target: float
    weights: str
    widths: Widths
    reached: float

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target, "weights": self.weights, "widths": self.widths.to_plain(),
            "reached": self.reached,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Snapshot:
        widths = Widths.from_plain(data["widths"])
        return cls(float(data["target"]), str(data["weights"]), widths, float(data["reached"]))


@dataclass(frozen=True)
class TrajectorySnapshots(PreparationOutcome):
    """A snapshot at every target, largest target first.

    Attributes:
        method: name of the method, for error messages; not stored.
        rounds: planned number of rounds of scoring and removal.
        steps_per_round: training steps after each round.
    """

    method: str
    snapshots: tuple[Snapshot, ...]
    rounds: int
    steps_per_round: int

    def at(self, target: float | None) -> Snapshot:
        """The snapshot of a target. BadInput, with the prepared targets, if there is none."""
        for snapshot in self.snapshots:
            if snapshot.target == target:
                return snapshot
        prepared = sorted(s.target for s in self.snapshots)
        raise BadInput(
            f"{self.method}.target must be one of the prepared targets "
            f"{', '.join(f'{t:g}' for t in prepared) or '(none)'} (got {target})",
            Code.NOT_FOUND,
            method=self.method,
            target=target,
            prepared=prepared,
        )

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(s.weights for s in self.snapshots)

    def weights_for(self, params: Mapping[str, Any]) -> str:
        return self.at(params["target"]).weights

    def shape_params(self, params: dict[str, Any]) -> dict[str, Any]:
        if params.get("target") is None:
            return params
        return {**params, "target": None, "widths": self.at(params["target"]).widths.to_plain()}

    def to_json(self) -> dict[str, Any]:
        return {
            "snapshots": [s.to_json() for s in self.snapshots], "rounds": self.rounds,
            "steps_a_round": self.steps_per_round,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], method: str = "") -> TrajectorySnapshots:
        snapshots = tuple(Snapshot.from_json(s) for s in data["snapshots"])
        return cls(method, snapshots, int(data["rounds"]), int(data["steps_a_round"]))


def targets_between(low: float, high: float, step: float) -> tuple[float, ...]:
    """All multiples of `step` below 1 that values from low to high round to, ascending."""
    steps = range(max(1, round(low / step)), round(high / step) + 1)
    return tuple(target for i in steps if (target := round(i * step, 4)) < 1)


def reachable(
    model: nn.Module, targets: Sequence[float], cost: Cost | None = None
) -> tuple[float, ...]:
    """The targets that removing whole groups of this model can reach, ascending.

    cost: default MACs. Raises BadInput if no target can be reached.
    """
    cost = macs_cost(model) if cost is None else cost
    widths, held = model_widths(model), fixed(model)
    found: list[float] = []
    for target in sorted(targets, reverse=True):
        try:
            check_reachable(cost, widths, target * cost(widths), held)
        except BadInput:
            if not found:
                raise
            break
        found.append(target)
    return tuple(sorted(found))


def planned_rounds(targets: Sequence[float], share: float) -> int:
    """The number of rounds of a trajectory in which a round removes `share` of the dense cost, or
    less if it meets a target.
    """
    stops = [1.0, *sorted(targets, reverse=True)]
    return sum(-(-round((a - b) * 1e6) // round(share * 1e6)) for a, b in itertools.pairwise(stops))
