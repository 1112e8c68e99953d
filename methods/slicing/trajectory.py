"""NViT's trajectory (Yang et al., CVPR 2023, section 3): rounds of scoring, removing and training.

Pure control flow on a model: images, losses and training are handed in by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.preparation import Progress
from vitpareto.methods.slicing.greedy import plan
from vitpareto.methods.slicing.importance import Objective, importances, top
from vitpareto.methods.slicing.plan import Cost, check_reachable, macs_cost
from vitpareto.methods.slicing.sliced_model import fixed, slice_model, sliced_model
from vitpareto.methods.slicing.snapshots import Snapshot
from vitpareto.methods.slicing.widths import Widths, model_widths

#: weight of a group's saved cost against its importance, both relative to their mean (`plan`)
ETA = 0.01
#: fraction of the dense model's cost that a round removes before the weights are trained again
SHARE = 0.02


@dataclass(frozen=True, eq=False)
class Round:
    """A trajectory after one round; a trajectory can continue from it.

    Attributes:
        index: number of the round, from 0.
        cost: as a fraction of the dense model's.
        widths: of the sliced model.
        state: the sliced model's state dict, on the CPU.
        reached: the targets that this round was the first to meet.
    """

    index: int
    cost: float
    widths: Widths
    state: dict[str, Tensor]
    reached: tuple[float, ...]

    def progress(self, snapshots: Sequence[Snapshot]) -> Progress:
        """This round and the snapshots so far, to resume from."""
        record = {
            "index": self.index, "cost": self.cost, "widths": self.widths.to_plain(),
            "reached": list(self.reached), "snapshots": [s.to_json() for s in snapshots],
        }  # fmt: skip
        return Progress(record, self.state)

    @classmethod
    def from_progress(cls, saved: Progress) -> Round:
        """The round of `progress`, without the snapshots."""
        record, widths = saved.record, Widths.from_plain(saved.record["widths"])
        return cls(record["index"], record["cost"], widths, saved.state, tuple(record["reached"]))


def trajectory(
    model: nn.Module,
    targets: Sequence[float],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    objective: Objective,
    update: Callable[[nn.Module, int], None],
    *,
    cost: Cost | None = None,
    eta: float = ETA,
    share: float = SHARE,
    start: Round | None = None,
) -> Iterator[Round]:
    """Prune the dense `model` to every target, largest first; yields a `Round` after each round.

    Args:
        model: the dense model; it is not changed.
        targets: fractions in (0, 1) of the dense model's `cost`.
        batches: `batches(round)` gives images and labels to score with, on the model's device.
        objective: the scalar loss of (model, images, labels).
        update: `update(model, round)` trains the sliced model in place.
        cost: of given widths, in any unit (default: MACs).
        eta: weight of saved cost against importance.
        share: fraction of the dense cost that a round removes; the round before a target removes
            only the rest, so that no target is missed.
        start: an earlier round to continue from. The result is that of an uninterrupted trajectory
            if `batches` and `update` depend only on the round.

    Raises:
        BadInput: before anything runs, for settings out of range and unreachable targets.
    """
    cost = macs_cost(model) if cost is None else cost
    dense, held = cost(model_widths(model)), fixed(model)
    wanted = sorted(set(targets), reverse=True)
    _check_settings(model, wanted, cost, share)
    index, current, widths = 0, model, model_widths(model)
    if start is not None:
        index, current, widths = start.index + 1, sliced_model(model, start.widths), start.widths
        current.load_state_dict(start.state)
    while pending := [t for t in wanted if cost(widths) > t * dense]:
        aim = max(pending[0] * dense, cost(widths) - share * dense)
        scores = importances(current, batches(index), objective)
        widths = plan(scores, widths, cost, aim, eta=eta, fixed=held)
        current = slice_model(current, top(scores, widths))
        update(current, index)
        reached = tuple(t for t in pending if cost(widths) <= t * dense)
        state = {name: t.detach().cpu().clone() for name, t in current.state_dict().items()}
        yield Round(index, cost(widths) / dense, widths, state, reached)
        index += 1


def _check_settings(model: nn.Module, targets: Sequence[float], cost: Cost, share: float) -> None:
    """Raises BadInput for numbers out of range, and for a target that cannot be reached."""
    for name, number, valid, accepted in (
        ("share", share, 0 < share <= 1, "(0, 1]"),
        *(("targets", target, 0 < target < 1, "(0, 1)") for target in targets),
    ):
        if not valid:
            raise BadInput(
                f"{name} must be in {accepted} (got {number!r})",
                Code.OUT_OF_RANGE,
                name=name,
                got=number,
            )
    widths, held = model_widths(model), fixed(model)
    for target in targets:
        check_reachable(cost, widths, target * cost(widths), held)
