"""NViT's way down, prepared once for a study: a snapshot of the sliced model at every target.

Scoring on calibration images, removal and short updates on training images take turns
(`methods.structure.nvit.trajectory`); after every round the state is on disk, so that a killed
preparation goes on from its last round.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto.methods import BadInput
from vitpareto.methods.slicing.plan import Cost, check_reachable, macs_cost
from vitpareto.methods.slicing.sliced_model import Widths, fixed, model_widths
from vitpareto.methods.structure.nvit import SHARE, STEP, Round, trajectory
from vitpareto.search.files.atomic import delete_file, write_atomic
from vitpareto.search.files.write_through import refresh
from vitpareto.search.models.weight_store import Artifacts
from vitpareto.search.training.batches import EpochBatches, TrainImages
from vitpareto.search.training.loop import Objective, fit
from vitpareto.search.training.losses import Distillation, supervised
from vitpareto.search.training.settings import Settings, seeded


@dataclass(frozen=True)
class Snapshot:
    """Where NViT's way down passed a target: the weights there, their widths, and the part of the
    dense cost that is left. `key`: the preparation's.
    """

    digest: str
    widths: dict[str, Any]
    reached: float
    key: str


def snapshot_of(snapshots: Mapping[float, Snapshot], target: float | None) -> Snapshot:
    """BadInput, naming what there is, where no snapshot was kept at this target."""
    found = None if target is None else snapshots.get(target)
    if found is None:
        there = ", ".join(f"{t:g}" for t in sorted(snapshots)) or "none"
        raise BadInput(f"nvit.target is {target}: this study prepared {there}")
    return found


def targets_of(low: float, high: float) -> tuple[float, ...]:
    """Every target that choices of NViT's `cost` from low to high resolve to."""
    steps = range(max(1, round(low / STEP)), round(high / STEP) + 1)
    return tuple(target for i in steps if (target := round(i * STEP, 4)) < 1)


@dataclass(frozen=True)
class WayDown:
    """One trajectory: the dense model, what it is scored on and trained with, and where it stops.

    cost: what a target is a fraction of (None: MACs). scored, images: calibration and training
    images on the model's device, with labels that are the head's; the dense model is the teacher.
    heard: told of every round.
    """

    dense: nn.Module
    targets: tuple[float, ...]
    scored: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    images: TrainImages
    settings: Settings
    cost: Cost | None = None
    heard: Callable[[str], None] = lambda line: None

    @property
    def rounds(self) -> int:
        """About how many rounds it takes."""
        stops = [1.0, *sorted(self.targets, reverse=True)]
        return sum(
            -(-round((a - b) * 1e6) // round(SHARE * 1e6)) for a, b in itertools.pairwise(stops)
        )

    @property
    def steps(self) -> int:
        """Training steps after each round: the epochs shared out among the rounds."""
        return max(1, round(self.settings.epochs * len(self.images(0)) / self.rounds))

    @property
    def objective(self) -> Objective:
        return supervised(self.dense, Distillation(self.settings.distill), self.settings.smoothing)

    def run(self, progress: Path, artifacts: Artifacts) -> dict[str, Any]:
        """A snapshot for every target, kept in `artifacts`; goes on from `progress`."""
        log = _Log(progress)
        start, snapshots = log.read()
        done = {s["target"] for s in snapshots}
        left = [t for t in self.targets if t not in done]
        rounds = trajectory(
            self.dense,
            left,
            lambda _: self.scored(),
            self.objective,
            self._update,
            cost=self.cost,
            start=start,
        )
        for found in rounds if left else ():
            if found.reached:
                digest = artifacts.save(found.state)
                widths = found.widths.to_plain()
                snapshots += [
                    {"target": t, "weights": digest, "widths": widths, "reached": found.cost}
                    for t in found.reached
                ]
            log.write(found, snapshots)
            self.heard(f"round {found.index + 1} of about {self.rounds}, {found.cost:.0%} left")
        return {"snapshots": snapshots, "rounds": self.rounds, "steps_a_round": self.steps}

    def _update(self, model: nn.Module, index: int) -> None:
        """A few steps of training, another part of the images after every round."""
        settings, device = self.settings, next(model.parameters()).device
        whole = len(self.images(0))
        epochs = -(-self.steps // whole)
        with seeded(settings.seed + index, str(device)):
            fit(
                model,
                lambda epoch: _First(self.images(index * epochs + epoch), -(-self.steps // epochs)),
                epochs=epochs,
                lr=settings.lr,
                objective=self.objective,
                optimizer=settings.optimizer,
                weight_decay=settings.weight_decay,
                autocast=torch.bfloat16 if device.type == "cuda" else None,
            )


@dataclass(frozen=True)
class _First:
    """The first batches of an epoch. Each is shuffled anew, so that the first of many see all."""

    epoch: EpochBatches
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.epoch))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(iter(self.epoch), len(self))


@dataclass(frozen=True)
class _Log:
    """The last round on disk: its weights by digest, and then the file that names them."""

    folder: Path

    @property
    def _file(self) -> Path:
        return self.folder / "round.json"

    def write(self, found: Round, snapshots: Sequence[Mapping[str, Any]]) -> None:
        weights = Artifacts(self.folder)
        digest = weights.save(found.state)
        said = {
            "index": found.index, "cost": found.cost, "widths": found.widths.to_plain(),
            "reached": list(found.reached), "weights": digest, "snapshots": list(snapshots),
        }  # fmt: skip
        write_atomic(self._file, json.dumps(said))
        for old in self.folder.glob("*.safetensors"):
            if old != weights.path(digest):
                delete_file(old)

    def read(self) -> tuple[Round | None, list[dict[str, Any]]]:
        if not refresh(self._file):
            return None, []
        said = json.loads(self._file.read_text(encoding="utf-8"))
        state = Artifacts(self.folder).load(said["weights"])
        widths = Widths.from_plain(said["widths"])
        last = Round(said["index"], said["cost"], widths, state, tuple(said["reached"]))
        return last, said["snapshots"]


def reachable(
    model: nn.Module, targets: Sequence[float], cost: Cost | None = None
) -> tuple[float, ...]:
    """The targets that whole groups of this model allow. BadInput where they allow none."""
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
