"""NViT's way down: a snapshot at every target, the same whether or not it was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.search.small import PREPROCESS, vit
from vitpareto.methods import BadInput, Recipe, model_shape
from vitpareto.methods.engine.weights import weights_digest
from vitpareto.methods.slicing.plan import macs_cost
from vitpareto.methods.slicing.sliced_model import Widths, model_widths, sliced_model
from vitpareto.search.data.datasets import Split
from vitpareto.search.measure.cost import macs
from vitpareto.search.models.weight_store import Artifacts
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.training.batches import TrainImages
from vitpareto.search.training.settings import Settings
from vitpareto.search.training.snapshots import (
    Snapshot,
    WayDown,
    reachable,
    snapshot_of,
    targets_of,
)

TARGETS = (0.85, 0.95)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """16 images of noise."""
    folder = tmp_path_factory.mktemp("split")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(16) % 10)
    return Split("train", folder, "noise", ())


def way(split: Split, killed_after: int | None = None, epochs: int = 1, targets=TARGETS) -> WayDown:
    """2 steps an epoch. killed_after: so many rounds end, the next is interrupted."""
    rounds = 0

    def scored() -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels = split.batch(0, 8)
        yield PREPROCESS.normalise(pixels), labels

    def scores() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal rounds
        if rounds == killed_after:
            raise KeyboardInterrupt
        rounds += 1
        return scored()

    batches = TrainImages(split, PREPROCESS, 10, 8)
    return WayDown(vit(), targets, scores, batches, Settings(epochs=epochs, lr=1e-3, batch=8))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, split: Split) -> tuple[dict, Artifacts]:
    folder = tmp_path_factory.mktemp("way")
    (folder / "progress").mkdir()
    artifacts = Artifacts(folder / "weights")
    return way(split).run(folder / "progress", artifacts), artifacts


def test_every_target_has_a_snapshot_that_costs_as_much(
    straight: tuple[dict, Artifacts],
) -> None:
    outcome, artifacts = straight
    found = {s["target"]: s for s in outcome["snapshots"]}
    assert sorted(found) == sorted(TARGETS)
    dense = macs(vit())
    for target, snapshot in found.items():
        state = artifacts.load(snapshot["weights"])
        assert weights_digest(state) == snapshot["weights"]
        recipe = Recipe.from_dict(
            {"structure": {"method": "nvit", "target": target}, "weights": snapshot["weights"]}
        )
        built = recipe.build(vit(), weights=state)
        assert macs(built) / dense == pytest.approx(snapshot["reached"])
        assert 0.97 * target <= snapshot["reached"] <= target
        assert model_widths(built).to_plain() == snapshot["widths"]
    assert not torch.equal(
        artifacts.load(found[0.95]["weights"])["head.weight"], vit().state_dict()["head.weight"]
    ), "nothing was trained between rounds"


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_way_down_comes_out_the_same(
    straight: tuple[dict, Artifacts], split: Split, tmp_path: Path, after: int
) -> None:
    progress, artifacts = tmp_path / "progress", Artifacts(tmp_path / "weights")
    progress.mkdir()
    with pytest.raises(KeyboardInterrupt):
        way(split, killed_after=after).run(progress, artifacts)
    assert len(list(progress.glob("*.safetensors"))) == 1, "the last round alone is kept"
    # no more rounds than are left
    outcome = way(split, killed_after=straight[0]["rounds"] - after).run(progress, artifacts)
    assert outcome == straight[0]
    assert all(artifacts.has(s["weights"]) for s in outcome["snapshots"])


def test_the_epochs_are_shared_out_among_the_rounds(split: Split) -> None:
    assert way(split).rounds == 3 + 5  # 0.02 a round: 1 to 0.95, and on to 0.85
    assert way(split).steps == 1 and way(split, epochs=100).steps == 25
    assert way(split, epochs=100, targets=(0.95,)).rounds == 3


def test_targets_are_all_that_a_search_can_ask_for() -> None:
    assert targets_of(0.2, 0.9) == tuple(round(0.05 * i, 4) for i in range(4, 19))
    assert targets_of(0.52, 0.68) == (0.5, 0.55, 0.6, 0.65, 0.7)
    assert targets_of(0.5, 0.5) == (0.5,) and targets_of(0.96, 1.0) == (0.95,)


def test_targets_out_of_reach_are_left_out() -> None:
    """A model of 64 channels: one group of everything is still 9 % of it."""
    assert reachable(vit(), (0.05, 0.5, 0.9)) == (0.5, 0.9)
    with pytest.raises(BadInput, match="with one group of everything left the cost is 0.09"):
        reachable(vit(), (0.01, 0.02))
    cost = macs_cost(vit())  # half of it is the same whatever the widths are
    floor = cost(model_widths(vit()))
    assert reachable(vit(), (0.5, 0.6), lambda w: cost(w) + floor) == (0.6,)


def test_a_target_means_its_snapshot_once_there_are_some(
    straight: tuple[dict, Artifacts],
) -> None:
    (snapshot,) = (s for s in straight[0]["snapshots"] if s["target"] == 0.85)
    recipe = Recipe.of("nvit", target=0.85)
    finder = ShapeFinder(vit())
    before, dense = finder(recipe), finder(Recipe())
    assert before.macs(before.dense_counts(), "mid-block") <= 0.85 * macs(vit())
    finder.know({0.85: Snapshot(snapshot["weights"], snapshot["widths"], 0.85, "key")})
    widths = Widths.from_plain(snapshot["widths"])
    assert finder(recipe) == model_shape(sliced_model(vit(), widths)) != before
    assert finder(Recipe()) == dense
    with pytest.raises(BadInput, match="nvit.target is 0.5: this study prepared 0.85"):
        finder(Recipe.of("nvit", target=0.5))
    with pytest.raises(BadInput, match="prepared none"):
        snapshot_of({}, 0.5)
