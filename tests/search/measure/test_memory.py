"""Parameters and peak memory against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.search.measure.methods_measured import SETTINGS, TRAINING_FREE, pruned
from tests.search.small import images, vit
from vitpareto import methods
from vitpareto.search.measure.memory import count_parameters, peak_mb


def test_parameters() -> None:
    with torch.device("meta"):
        assert count_parameters(timm.create_model("deit_small_patch16_224")) == 22_050_664
    assert count_parameters(pruned("topk")) == count_parameters(vit())
    # a smaller input has fewer position embeddings: 25 of 64
    assert count_parameters(vit()) - count_parameters(pruned("resize")) == (64 - 25) * 64


class Tiny(nn.Module):
    """Two layers: 48 -> 100 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        x = x.relu()
        x = x.view(-1, 10, 10).transpose(1, 2).reshape(len(x), 100)
        return self.second(x)


@pytest.mark.parametrize("batch", [1, 7])
def test_peak_memory_of_two_layers_is_the_sum_made_by_hand(batch: int) -> None:
    """Weights, and two hidden activations at once: a view, of the images too, is no new memory."""
    model, given = Tiny(), torch.randn(batch, 3, 4, 4)
    weights = 48 * 100 + 100 + 100 * 10 + 10
    assert peak_mb(model, given) == pytest.approx(4 * (weights + 2 * 100 * batch) / 1e6, rel=1e-12)


class Viewed(nn.Module):
    """Gives what views of its parameter and of the images add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        bias, same = self.bias.view(10, 100).t(), x.float()
        return same.flatten(1)[:, :2] + bias[0, :2]


def test_views_of_weights_and_images_cost_no_memory() -> None:
    assert peak_mb(Viewed(), torch.ones(5, 3, 9, 9)) == pytest.approx(4 * (1000 + 5 * 2) / 1e6)


def test_peak_memory_grows_with_the_batch_and_holds_weights_and_logits() -> None:
    peaks = [peak_mb(vit(), images(count)) for count in (1, 2, 8)]
    assert peaks == sorted(peaks) and peaks[2] > peaks[0]
    # activations grow linearly, weights not at all
    assert peaks[2] - peaks[0] == pytest.approx(7 * (peaks[1] - peaks[0]), rel=1e-6)
    assert peaks[0] > (4 * count_parameters(vit()) + 4 * 10) / 1e6
    assert peak_mb(vit(), images(8)) == peaks[2], "and it is the same each time"


#: models of real proportions, an MLP four times as wide: DeiT-Ti; ViT-S of 784 patches without a
#: class token, in whose place methods look at every patch's attention
PROPORTIONS: dict[str, dict[str, Any]] = {
    "class token": {"model_name": "deit_tiny_patch16_224", "depth": 4},
    "none": {
        "model_name": "vit_small_patch16_224", "depth": 4, "img_size": 448, "class_token": False,
        "global_pool": "avg",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", PROPORTIONS)
@pytest.mark.parametrize("name", [n for n in TRAINING_FREE if n != "dense"])
def test_pruned_models_take_no_more_memory_than_dense(name: str, kind: str) -> None:
    """Reducing from the first block, where most tokens are alive while the method looks at them."""
    settings = {
        **SETTINGS,
        "resize": {"size": 160},
        "tome": {"r": 13},
        "topk": {"keep_rate": 0.75, "prune_layers": (0, 1, 2)},
        "tram": {"keep_rate": 0.75, "prune_layers": (0, 1, 2)},
        "evit": {"keep_rate": 0.75, "prune_layers": (0, 1, 2)},
        "random": {"keep_rate": 0.75, "prune_layers": (0, 1, 2)},
        "centre": {"keep_rate": 0.75, "prune_layers": (0, 1, 2)},
        "rajni": {"gamma": 1.0, "min_tokens": 5, "counts": (150, 100, 50, 25)},
        "ats": {"prune_layers": (0, 1, 2)},
        "ppt": {"r": 13, "prune_layers": (0, 1, 2)},
    }
    torch.manual_seed(0)
    model = timm.create_model(**PROPORTIONS[kind]).eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    less = methods.prune(model, name, **settings[name])
    held = sum(b.numel() * b.element_size() for b in less.get_submodule("reduction").buffers())
    # what a method carries past an MLP: for every patch a score, a size and an index
    carried = (4 + 4 + 8) * 2 * (model.patch_embed.num_patches + 2)
    assert peak_mb(less, x) - (held + carried) / 1e6 <= peak_mb(methods.prune(model, "dense"), x)
    assert peak_mb(methods.prune(model, "dense"), x) <= peak_mb(model, x)
