"""NViT (Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023,
arXiv:2110.04869): removes the globally least important heads, and channels of q/k, v, MLPs and the
embedding.

Rounds of scoring, removing and a little training repeat until the cost meets the target. Removed
units are sliced out of the weights at once, so that every round runs on the smaller model. One
trajectory passes all targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import Paper, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float, Parameter
from vitpareto.methods.engine.preparation import PreparationTrainer, WidthsCost
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.slicing.importance import magnitudes, top
from vitpareto.methods.slicing.plan import even, macs_cost
from vitpareto.methods.slicing.sliced_model import fixed, slice_model, sliced_model
from vitpareto.methods.slicing.snapshots import (
    Snapshot,
    TrajectorySnapshots,
    planned_rounds,
    reachable,
    targets_between,
)
from vitpareto.methods.slicing.trajectory import ETA, SHARE, Round, trajectory
from vitpareto.methods.slicing.widths import ACCEPTED, PARTS, Widths, model_widths, widths_of

#: step between the targets of a search, so that one trajectory has few snapshots
STEP = 0.05


@dataclass(frozen=True)
class WidthsParameter(Parameter):
    """A model's widths in the form of `Widths.to_plain`."""

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
    """Removes heads in groups of 2, q/k and v channels in groups of 8 per head (each head its own
    least important ones, so that all heads of a block stay equally wide), and hidden and embedding
    channels in groups of 16. Widths that cannot be cut exactly stay as they are (`widths.fixed`).

    The recipe of a trained candidate names its snapshot by `weights`, from which its widths are
    read. Without weights a target means even widths and the units with the largest magnitude:
    right costs and shapes, no accuracy.
    """

    name = "nvit"
    summary = "remove the globally least important heads, channels and hidden units"
    paper = Paper(
        "Global Vision Transformer Pruning with Hessian-Aware Saliency",
        "Yang, Yin, Shen, Molchanov, Li, Kautz",
        2023,
        "https://arxiv.org/abs/2110.04869",
    )
    kind = "structure"
    site = "the weights"
    training = "required"
    needs_preparation = True
    reads_calibration = True
    reads_latency_table = True
    parameters = (
        Float("target", "cost left, as a fraction of the dense model's", default=None, low=0.0,
              high=1.0, open_low=True),
        Float("eta", "weight of saved cost against importance", default=ETA, low=0.0, high=100.0),
        WidthsParameter("widths", "the widths themselves; replaces target"),
    )  # fmt: skip
    space = (Float("cost", "target, rounded to 0.05", low=0.2, high=0.9),)
    # fractions of the 17.68 GFLOPs of DeiT-B-distilled
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
            given = checked["target"] is not None
            raise BadInput(
                "exactly one of nvit.target and nvit.widths must be given "
                f"(got {'both' if given else 'neither'})",
                Code.CONFLICT if given else Code.MISSING,
                name="target",
                where="nvit",
                excludes=["widths"],
            )
        return checked

    def check_shape(self, params: dict[str, Any], shape: ModelShape) -> None:
        blocks = params["widths"] and params["widths"]["blocks"]
        if blocks and len(blocks) != shape.depth:
            raise BadInput(
                f"nvit.widths must have one entry per block, {shape.depth} (got {len(blocks)})",
                Code.MISMATCH,
                name="widths",
                where="nvit",
                got=len(blocks),
                expected=shape.depth,
            )

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        return params["target"] == 1.0

    def shaped_by_weights(self, params: dict[str, Any]) -> bool:
        return params["target"] is not None and params["target"] < 1.0

    def signature(self, params: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        """The resulting widths; the recipe's digest tells apart weights of the same widths."""
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
        dense = model_widths(model)
        widths = None if params["widths"] is None else Widths.from_plain(params["widths"])
        if weights is not None:
            trained = widths_of(weights)
            if widths is not None and widths != trained:
                raise BadInput(
                    f"nvit.widths must be those of the weights, {trained.to_plain()} "
                    f"(got {widths.to_plain()})",
                    Code.MISMATCH,
                    name="widths",
                    where="nvit",
                    got=widths.to_plain(),
                    expected=trained.to_plain(),
                )
            return sliced_model(model, trained)
        if widths is None:
            cost = macs_cost(model)
            widths = even(dense, cost, params["target"] * cost(dense), fixed(model))
        _check_narrower(widths, dense)
        if next(model.parameters()).is_meta:
            return sliced_model(model, widths)
        return slice_model(model, top(magnitudes(model), widths))


def _check_narrower(widths: Widths, dense: Widths) -> None:
    """Raises BadInput if a width is larger than the dense model's."""
    _check_width("embedding", widths.embedding, dense.embedding)
    for index, (block, limit) in enumerate(zip(widths.blocks, dense.blocks, strict=True)):
        for part in PARTS:
            _check_width(f"{part} of block {index}", getattr(block, part), getattr(limit, part))


def _check_width(part: str, width: int, limit: int) -> None:
    if width > limit:
        raise BadInput(
            f"nvit.widths must be at most the model's, {limit} for {part} (got {width})",
            Code.OUT_OF_RANGE,
            name="widths",
            where="nvit",
            part=part,
            got=width,
            accepted=limit,
        )
