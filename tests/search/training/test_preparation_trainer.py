"""NViT's preparation: a snapshot at every target, the same with and without interruption."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.refusals import refused
from tests.search.small import PREPROCESS, vit
from vitpareto import methods
from vitpareto.methods import BadInput, Recipe, model_shape
from vitpareto.methods.engine.parameters import Float
from vitpareto.methods.engine.weights import weights_digest
from vitpareto.methods.slicing.plan import macs_cost
from vitpareto.methods.slicing.sliced_model import model_widths, sliced_model
from vitpareto.methods.slicing.snapshots import (
    TrajectorySnapshots,
    planned_rounds,
    reachable,
    targets_between,
)
from vitpareto.search.data.decoded import Split
from vitpareto.search.measure import macs
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.training.preparation_trainer import CachedTrainer, TrainingImages
from vitpareto.search.training.settings import TrainingSettings

TARGETS = (0.85, 0.95)
PLAN = {"targets": list(TARGETS), "eta": 0.01, "share": 0.02}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """16 images of noise."""
    folder = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(16) % 10)
    return Split("train", folder, "noise", ())


class Interrupted(CachedTrainer):
    """A trainer that is interrupted when the model is scored for the n-th time."""

    interrupted_at: int | None = None
    scored: int = 0

    def calibration_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.scored == self.interrupted_at:
            raise KeyboardInterrupt
        object.__setattr__(self, "scored", self.scored + 1)
        pixels, labels = self.images.split.batch(0, 8)
        yield PREPROCESS.normalise(pixels), labels


def trainer(split: Split, folder: Path, after: int | None = None, epochs: int = 1) -> Interrupted:
    """2 steps per epoch. after: number of rounds after which it is interrupted."""
    (folder / "progress").mkdir(parents=True, exist_ok=True)
    images = TrainingImages(split, split, PREPROCESS, "digits", None)
    made = Interrupted(
        "nvit", vit(), vit(), images, TrainingSettings(epochs=epochs, lr=1e-3, batch=8),
        folder / "progress", WeightStore(folder / "weights"),
    )  # fmt: skip
    object.__setattr__(made, "interrupted_at", after)
    return made


def prepared(with_trainer: Interrupted) -> TrajectorySnapshots:
    outcome = methods.get("nvit").prepare(PLAN, with_trainer)
    assert isinstance(outcome, TrajectorySnapshots)
    return outcome


@pytest.fixture(scope="module")
def straight(
    tmp_path_factory: pytest.TempPathFactory, split: Split
) -> tuple[TrajectorySnapshots, WeightStore]:
    made = trainer(split, tmp_path_factory.mktemp("straight"))
    return prepared(made), made.weights


def test_every_target_has_a_snapshot_of_that_cost(
    straight: tuple[TrajectorySnapshots, WeightStore],
) -> None:
    outcome, artifacts = straight
    assert sorted(s.target for s in outcome.snapshots) == sorted(TARGETS)
    dense = macs(vit())
    for snapshot in outcome.snapshots:
        state = artifacts.load(snapshot.weights)
        assert weights_digest(state) == snapshot.weights
        step = {"method": "nvit", "target": snapshot.target}
        recipe = Recipe.from_dict({"structure": step, "weights": snapshot.weights})
        built = recipe.build(vit(), weights=state)
        assert macs(built) / dense == pytest.approx(snapshot.reached)
        assert 0.97 * snapshot.target <= snapshot.reached <= snapshot.target
        assert model_widths(built) == snapshot.widths
    last = artifacts.load(outcome.at(0.95).weights)["head.weight"]
    assert not torch.equal(last, vit().state_dict()["head.weight"]), "rounds train the weights"


def test_the_outcome_is_the_same_after_json(
    straight: tuple[TrajectorySnapshots, WeightStore],
) -> None:
    outcome = straight[0]
    data = outcome.to_json()
    assert set(data) == {"snapshots", "rounds", "steps_a_round"}
    assert methods.get("nvit").preparation_outcome(data) == outcome


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_preparation_gives_the_same_outcome(
    straight: tuple[TrajectorySnapshots, WeightStore], split: Split, tmp_path: Path, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(trainer(split, tmp_path, after))
    progress = tmp_path / "progress"
    assert len(list(progress.glob("*.safetensors"))) == 1, "only the last round is saved"
    # no more rounds than are left
    resumed = trainer(split, tmp_path, straight[0].rounds - after)
    outcome = prepared(resumed)
    assert outcome == straight[0]
    assert all(resumed.weights.has(digest) for digest in outcome.digests)


def test_the_epochs_are_divided_among_the_rounds(split: Split, tmp_path: Path) -> None:
    # 0.02 of the cost per round: 3 from 1 to 0.95, and 5 on to 0.85
    assert planned_rounds(TARGETS, 0.02) == 3 + 5 and planned_rounds((0.95,), 0.02) == 3
    made = trainer(split, tmp_path, epochs=100)
    assert made.epochs * made.steps_per_epoch == 200  # 25 steps after each round
    steps: list[int] = []
    object.__setattr__(made, "update", lambda model, index, count: steps.append(count))
    outcome = prepared(made)
    assert outcome.steps_per_round == 25 and set(steps) == {25}


def test_targets_are_all_that_a_search_can_propose() -> None:
    assert targets_between(0.2, 0.9, 0.05) == tuple(round(0.05 * i, 4) for i in range(4, 19))
    assert targets_between(0.52, 0.68, 0.05) == (0.5, 0.55, 0.6, 0.65, 0.7)
    assert targets_between(0.5, 0.5, 0.05) == (0.5,)
    assert targets_between(0.96, 1.0, 0.05) == (0.95,)
    nvit = methods.get("nvit")
    bounds = Float("cost", low=0.52, high=0.68)
    assert nvit.preparation_plan(vit(), {"cost": bounds}, None)["targets"] == [
        0.5, 0.55, 0.6, 0.65, 0.7,
    ]  # fmt: skip
    assert nvit.preparation_plan(vit(), {"cost": 0.5}, None)["targets"] == [0.5]


def test_targets_out_of_reach_are_left_out() -> None:
    """A model of 64 channels: one group of everything is still 9 % of it."""
    assert reachable(vit(), (0.05, 0.5, 0.9)) == (0.5, 0.9)
    with pytest.raises(BadInput):
        reachable(vit(), (0.01, 0.02))
    cost = macs_cost(vit())  # half of it is the same whatever the widths are
    floor = cost(model_widths(vit()))
    assert reachable(vit(), (0.5, 0.6), lambda w: cost(w) + floor) == (0.6,)


def test_a_target_has_the_shape_of_its_snapshot_once_prepared(
    straight: tuple[TrajectorySnapshots, WeightStore],
) -> None:
    outcome = TrajectorySnapshots("nvit", (straight[0].at(0.85),), 1, 1)
    recipe = Recipe.of("nvit", target=0.85)
    finder = ShapeFinder(vit())
    before, dense = finder(recipe), finder(Recipe())
    assert before.macs(before.dense_counts(), "mid-block") <= 0.85 * macs(vit())
    finder.use_outcomes({"nvit": outcome})
    widths = outcome.at(0.85).widths
    assert finder(recipe) == model_shape(sliced_model(vit(), widths)) != before
    assert finder(Recipe()) == dense
    with refused("not-found", method="nvit", target=0.5, prepared=[0.85]):
        finder(Recipe.of("nvit", target=0.5))
    finder.use_outcomes({})
    with refused("not-found", method="nvit"):
        finder(recipe)
