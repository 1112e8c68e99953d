"""The embedded model: accurate, small, and sensitive to which patches a method keeps (otherwise the
demo's front would show nothing).
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitpareto import methods
from vitpareto.search.data import embedded_images
from vitpareto.search.measure import macs
from vitpareto.search.models import embedded_model
from vitpareto.search.training.embedded import top1

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
    return embedded_model.build()


def test_the_weights_are_small_and_the_data_configuration_is_complete(model: nn.Module) -> None:
    stored = (
        files("vitpareto.search.models").joinpath("weights", "digits_vit.safetensors").read_bytes()
    )
    assert len(stored) < 1_900_000
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 64, 64) and data["crop_pct"] == 1.0
    assert data["mean"] == (0.2, 0.2, 0.2) and data["std"] == (0.25, 0.25, 0.25)
    assert data["interpolation"] == "bicubic"
    assert not model.training and len(model.blocks) == 12  # type: ignore[arg-type]
    images = embedded_images.draw("search")[0][:8]
    transform = timm.data.create_transform(**data)
    from_pil = torch.stack([transform(Image.fromarray(image)) for image in images])
    torch.testing.assert_close(from_pil, embedded_images.normalise(images), atol=1e-6, rtol=1e-6)


def test_accuracy_of_the_dense_model(model: nn.Module) -> None:
    assert top1(model, "held-out") >= 95


def test_merging_half_of_the_tokens_costs_little_accuracy(model: nn.Module) -> None:
    merged = top1(methods.prune(model, "tome", r=6), "search")
    assert merged >= top1(model, "search") - 2


def test_topk_is_better_than_random_dropping(model: nn.Module) -> None:
    best = methods.prune(model, "topk", **TOPK)
    controls = [methods.prune(model, "random", **setting) for setting in RANDOM]
    half = macs(methods.prune(model, "dense")) / 2
    assert all(macs(pruned) <= half for pruned in [best, *controls])
    at_random = max(top1(control, "search") for control in controls)
    assert top1(best, "search") >= at_random + 5
