"""NViT (Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023,
arXiv:2110.04869): the globally least important heads, q/k, v, hidden and embedding channels go.

Scored, removed and trained a little in turn, until the cost is the target. What is removed is
sliced out of the weights at once, so that every round runs on the smaller model. One trajectory
passes every target on its way down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.method import Method, Paper, Preset
from vitpareto.methods.engine.parameters import Float, Parameter
from vitpareto.methods.engine.preparation import PreparationTrainer, Progress, WidthsCost
from vitpareto.methods.engine.registry import register
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.slicing.importance import Objective, importances, magnitudes, top
from vitpareto.methods.slicing.plan import Cost, check_reachable, even, macs_cost, plan
from vitpareto.methods.slicing.sliced_model import fixed, slice_model, sliced_model
from vitpareto.methods.slicing.snapshots import (
    Snapshot,
    TrajectorySnapshots,
    planned_rounds,
    reachable,
    targets_between,
)
from vitpareto.methods.slicing.widths import ACCEPTED, PARTS, Widths, model_widths, widths_of

#: what a saved group's cost is worth, in the mean importance of a group (`plan.plan`)
ETA = 0.01
#: how much of the dense model's cost a round removes before the weights are trained again
SHARE = 0.02
#: the search takes targets in these steps, so that one trajectory has few snapshots
STEP = 0.05


@dataclass(frozen=True, eq=False)
class Round:
    """A trajectory after one round: enough to continue from, and a snapshot of its targets.

    cost: as a fraction of the dense model's. state: the sliced model's state dict, on the CPU.
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
    """Prune the dense `model` (left as it was) down to every target, largest first; one `Round`
    after each round.

    targets: fractions of the dense model's `cost` (default: MACs), in (0, 1). `batches(round)`
    gives images and labels to score with `objective(model, images, labels)`, on the model's
    device; `update(model, round)` trains the sliced model in place. A round removes `share` of the
    dense cost, or what is left to the next target: no target is run past. A generator given an
    earlier `start` continues from it as if it had never stopped, as far as `batches` and `update`
    depend on the round alone.

    BadInput, before anything runs, for settings out of range and targets out of reach.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share is {share!r}: accepted is a number, 0 < share <= 1")
    cost = macs_cost(model) if cost is None else cost
    dense, held = cost(model_widths(model)), fixed(model)
    wanted = sorted(set(targets), reverse=True)
    for target in wanted:
        if not 0 < target < 1:
            raise BadInput(f"a target is {target!r}: accepted is a number between 0 and 1")
        check_reachable(cost, model_widths(model), target * dense, held)
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


@dataclass(frozen=True)
class WidthsParameter(Parameter):
    """A model's widths, as `Widths.to_plain` gives them."""

    default: Any = None

    @property
    def accepts(self) -> str:
        return ACCEPTED

    def check(self, value: Any, where: str) -> dict[str, Any] | None:
        if value is None:
            return None
        return Widths.from_plain(value, f"{where}.{self.name}").to_plain()


@register
class NViT(Method):
    """Heads go by 2, q/k and v channels by 8 in every head of a block (each head its own least
    important ones, so that its heads stay equally wide), hidden and embedding channels by 16.
    Where a part of a model cannot be cut exactly, that dimension stays (`sliced.fixed`).

    A trained candidate names its snapshot by `weights`, which holds its dimensions. Without
    weights, a target means even widths, and the units of least magnitude go: costs and shapes to
    start from, not accuracy.
    """

    name = "nvit"
    summary = "cut the globally least important heads, channels and hidden units out of the weights"
    paper = Paper(
        "Global Vision Transformer Pruning with Hessian-Aware Saliency",
        "Yang, Yin, Shen, Molchanov, Li, Kautz",
        2023,
        "https://arxiv.org/abs/2110.04869",
    )
    kind = "structure"
    site = "the weights"
    training = "required"
    trained_once = True
    reads_calibration = True
    reads_latency_table = True
    parameters = (
        Float("target", "cost left, as a fraction of the dense model's", default=None, low=0.0,
              high=1.0, open_low=True),
        Float("eta", "what a saved group's cost is worth, in the mean importance of a group",
              default=ETA, low=0.0, high=100.0),
        WidthsParameter("widths", "the dimensions themselves, in the place of a target"),
    )  # fmt: skip
    space = (Float("cost", "target, to 0.05", low=0.2, high=0.9),)
    # targets of DeiT-B-distilled's 17.68 GFLOPs
    presets = tuple(
        Preset(f"NViT-{name}", {"target": round(giga / 17.68, 4)}, f"NViT's README: {giga} G")
        for name, giga in (("B", 6.8), ("H", 6.2), ("S", 4.2), ("T", 1.3))
    )
    identity = {"target": 1.0}

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        if "target" in choices:
            return dict(choices)
        return {"target": round(max(1, round(choices["cost"] / STEP)) * STEP, 4)}

    def check(self, params: dict[str, Any], shape: ModelShape | None = None) -> dict[str, Any]:
        checked = super().check(params, shape)
        if (checked["target"] is None) == (checked["widths"] is None):
            raise BadInput(
                "nvit needs target, a fraction of the dense model's cost, or widths: one of them, "
                "not both"
            )
        return checked

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        blocks = params["widths"] and params["widths"]["blocks"]
        if blocks and len(blocks) != shape.depth:
            raise BadInput(
                f"nvit.widths has {len(blocks)} blocks: the model has {shape.depth} blocks"
            )

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        return params["target"] == 1.0

    def shaped_by_weights(self, params: dict[str, Any]) -> bool:
        return params["target"] is not None and params["target"] < 1.0

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        """The dimensions that came out; which weights they hold is the recipe's to say."""
        widths = [[b.heads, b.qk, b.v, b.mlp] for b in shape.blocks]
        return {"embedding": shape.dim, "blocks": widths}

    # -- preparation ---------------------------------------------------------------------------

    def preparation_plan(
        self, model: nn.Module, searched: Mapping[str, Any], cost: WidthsCost | None
    ) -> dict[str, Any]:
        """The targets that the search can propose and whole groups of the model can reach."""
        asked = searched["cost"]
        low, high = (asked.low, asked.high) if isinstance(asked, Float) else (asked, asked)
        targets = reachable(model, targets_between(low, high, STEP), cost)
        return {"targets": list(targets), "eta": ETA, "share": SHARE}

    def prepare(self, plan: Mapping[str, Any], trainer: PreparationTrainer) -> TrajectorySnapshots:
        """One trajectory through every target; the training epochs are divided among its rounds.

        The state after every round is saved, so that an interrupted preparation resumes there.
        """
        targets = plan["targets"]
        rounds = planned_rounds(targets, plan["share"])
        steps = max(1, round(trainer.epochs * trainer.steps_per_epoch / rounds))
        saved = trainer.load_progress()
        start = None if saved is None else Round.from_progress(saved)
        found = [] if saved is None else list(map(Snapshot.from_json, saved.record["snapshots"]))
        pending = [t for t in targets if t not in {s.target for s in found}]
        following = trajectory(
            trainer.model,
            pending,
            lambda index: trainer.calibration_batches(),
            trainer.objective,
            lambda model, index: trainer.update(model, index, steps),
            cost=trainer.cost,
            eta=plan["eta"],
            share=plan["share"],
            start=start,
        )
        for done in following if pending else ():
            if done.reached:
                digest = trainer.save_weights(done.state)
                found += [Snapshot(t, digest, done.widths, done.cost) for t in done.reached]
            trainer.save_progress(done.progress(found))
            trainer.report(f"round {done.index + 1} of about {rounds}, cost {done.cost:.0%}")
        return TrajectorySnapshots(self.name, tuple(found), rounds, steps)

    def preparation_outcome(self, data: Mapping[str, Any]) -> TrajectorySnapshots:
        return TrajectorySnapshots.from_json(data, self.name)

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        if params["target"] == 1.0:
            return model
        own = model_widths(model)
        asked = None if params["widths"] is None else Widths.from_plain(params["widths"])
        if weights is not None:
            found = widths_of(weights)
            if asked is not None and asked != found:
                raise BadInput(
                    f"nvit.widths are {asked.to_plain()}, those of the weights {found.to_plain()}"
                )
            return sliced_model(model, found)
        if asked is None:
            cost = macs_cost(model)
            asked = even(own, cost, params["target"] * cost(own), fixed(model))
        _check_narrower(asked, own)
        if next(model.parameters()).is_meta:
            return sliced_model(model, asked)
        return slice_model(model, top(magnitudes(model), asked))


def _check_narrower(asked: Widths, own: Widths) -> None:
    """BadInput where a width is larger than the model's."""
    if asked.embedding > own.embedding:
        raise BadInput(
            f"nvit.widths has the embedding {asked.embedding}: the model has {own.embedding}"
        )
    for index, (a, b) in enumerate(zip(asked.blocks, own.blocks, strict=True)):
        for part in PARTS:
            if getattr(a, part) > getattr(b, part):
                raise BadInput(
                    f"nvit.widths has {part} {getattr(a, part)} for block {index}: the model has "
                    f"{getattr(b, part)}"
                )
