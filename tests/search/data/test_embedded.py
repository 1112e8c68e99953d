"""The embedded model and images: honest splits, repeatable drawings and training, and a model on
which the choice of patches matters (the demo's front would say nothing otherwise)."""

from __future__ import annotations

import functools
import itertools
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitpareto import methods
from vitpareto.search.data import embedded
from vitpareto.search.measure.cost import macs
from vitpareto.search.training.loop import Epoch, cross_entropy, fit

# Found by a sweep over first prune layer 0..9, 1..4 stages, spacing 1..3 on the search images:
# the best schedules at no more than half of the dense MACs.
TOPK: dict[str, Any] = {"keep_rate": 0.39, "prune_layers": (2,)}
RANDOM: list[dict[str, Any]] = [
    {"keep_rate": 0.6, "prune_layers": (2, 3)},
    {"keep_rate": 0.45, "prune_layers": (1,)},
    {"keep_rate": 0.66, "prune_layers": (1, 2)},
    {"keep_rate": 0.82, "prune_layers": (0, 1, 2, 3)},
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return embedded.build()


def test_no_source_digit_serves_two_splits() -> None:
    digits = {split: set(embedded.source_digits(split).tolist()) for split in embedded.SPLITS}
    assert {split: len(found) for split, found in digits.items()} == embedded.SPLITS
    for one, other in itertools.combinations(digits.values(), 2):
        assert not one & other
    assert set().union(*digits.values()) == set(range(1797))


def test_drawings_repeat_and_differ_where_they_should() -> None:
    images, labels = embedded.draw("calibration")
    again, _ = embedded.draw("calibration")
    assert images.shape == (200, 64, 64, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert images.tobytes() == again.tobytes()
    first, same = embedded.draw("train", 0)
    second, labels_again = embedded.draw("train", 1)
    assert (first != second).any(axis=(1, 2, 3)).all()
    assert (same == labels_again).all()


def test_drawings_do_not_move_between_versions() -> None:
    # Means, not a hash: the last bit of a sine may differ between processors.
    for split, mean in {"calibration": 26.35172, "held-out": 25.77192}.items():
        assert embedded.draw(split)[0].mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("split", embedded.SPLITS)
def test_every_prefix_is_nearly_balanced(split: str) -> None:
    labels = embedded.draw(split)[1]
    share = np.bincount(labels, minlength=10) / len(labels)
    for n in range(1, len(labels) + 1):
        # A class's members are spread one to an interval, so a prefix is off by less than 2
        # (1 at either end) against the whole 1,797, hence 3 against its own split.
        assert np.abs(np.bincount(labels[:n], minlength=10) - n * share).max() < 3
    assert not (np.diff(labels) >= 0).all()


def test_the_weights_are_small_and_the_model_is_described(model: nn.Module) -> None:
    stored = (
        files("vitpareto.search.data").joinpath("weights", "digits_vit.safetensors").read_bytes()
    )
    assert len(stored) < 1_900_000
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 64, 64) and data["crop_pct"] == 1.0
    assert data["mean"] == (0.2, 0.2, 0.2) and data["std"] == (0.25, 0.25, 0.25)
    assert data["interpolation"] == "bicubic"
    assert not model.training and len(model.blocks) == 12  # type: ignore[arg-type]
    images = embedded.draw("search")[0][:8]
    transform = timm.data.create_transform(**data)
    from_pil = torch.stack([transform(_pil(image)) for image in images])
    torch.testing.assert_close(from_pil, embedded.normalise(images), atol=1e-6, rtol=1e-6)


def _pil(image: np.ndarray) -> object:
    from PIL import Image

    return Image.fromarray(image)


def test_the_dense_model_reads_held_out_digits(model: nn.Module) -> None:
    assert embedded.top1(model, "held-out") >= 95


def test_merging_half_away_costs_little(model: nn.Module) -> None:
    merged = embedded.top1(methods.prune(model, "tome", r=6), "search")
    assert merged >= embedded.top1(model, "search") - 2


def test_choosing_patches_beats_dropping_them_at_random(model: nn.Module) -> None:
    best = methods.prune(model, "topk", **TOPK)
    controls = [methods.prune(model, "random", **setting) for setting in RANDOM]
    half = macs(methods.prune(model, "dense")) / 2
    assert all(macs(pruned) <= half for pruned in [best, *controls])
    at_random = max(embedded.top1(control, "search") for control in controls)
    assert embedded.top1(best, "search") >= at_random + 5


def test_training_repeats_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two steps of a shallower model: the same code in less time.
    monkeypatch.setattr(embedded, "_BATCH", 300)
    monkeypatch.setattr(embedded, "_DEPTH", 8)
    monkeypatch.setattr(embedded, "_paint", functools.cache(embedded._paint))
    state = torch.get_rng_state()
    losses: list[Epoch] = []
    results = [
        embedded.train(tmp_path / f"{i}.safetensors", epochs=1, progress=losses.append)
        for i in range(2)
    ]
    assert results[0] == results[1] and losses[0] == losses[1]
    assert 0 <= results[0]["held-out_top1"] <= 100
    one, other = ((tmp_path / f"{i}.safetensors").read_bytes() for i in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="unknown split 'heldout': did you mean 'held-out'"):
        embedded.draw("heldout")
    with pytest.raises(ValueError, match="cannot be negative but got -1"):
        embedded.draw("train", -1)
    with pytest.raises(ValueError, match="'search' has one drawing, epoch 0, but epoch 3"):
        embedded.draw("search", 3)


def test_fit_refuses_what_cannot_be_trained() -> None:
    net = nn.Linear(2, 2)
    batch = (torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 1 epoch but got 0"):
        fit(net, lambda _: [batch], epochs=0, lr=1.0)
    with pytest.raises(ValueError, match="must be positive but got 0"):
        fit(net, lambda _: [batch], epochs=1, lr=0.0)
    with pytest.raises(ValueError, match="epoch 0 has no batches"):
        fit(net, lambda _: [], epochs=1, lr=1.0)
    with pytest.raises(ValueError, match="smoothing must be in"):
        cross_entropy(1.0)
    broken = (torch.full((4, 2), torch.nan), batch[1])
    with pytest.raises(FloatingPointError, match="nan at epoch 1, step 1"):
        fit(net, lambda epoch: [batch, broken if epoch else batch], epochs=2, lr=0.1)


def test_fit_lowers_the_loss_along_its_schedule() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 2)
    labels = (images[:, 0] > 0).long()
    net = nn.Linear(2, 2)
    history = fit(net, lambda _: [(images, labels)] * 4, epochs=10, lr=0.1, warmup_epochs=2)
    assert history[-1].loss < history[0].loss / 2
    rates = [epoch.lr for epoch in history]
    assert rates[0] < max(rates) and rates[-1] < 0.01 * max(rates)
    assert not net.training
