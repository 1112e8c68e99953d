"""What a model costs, against published tables, two other counters and counts made by hand."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.search.small import images, vit
from vitpareto import methods
from vitpareto.methods import BadInput, Recipe
from vitpareto.search.measure.cost import (
    device_name,
    fvcore_macs,
    latency,
    macs,
    median_interval,
    padded_counts,
    parameters,
    peak_mb,
    recipe_macs,
    recipe_of,
    target_of,
)

#: a setting that reduces, for every method that needs no gradient training
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {"keep_rate": 0.7, "prune_layers": (2, 5)},
    "centre": {"keep_rate": 0.7, "prune_layers": (2, 5)},
    "resize": {"size": 40},
    "topk": {"keep_rate": 0.6, "prune_layers": (0, 3, 7)},
    "tram": {"keep_rate": 0.6, "prune_layers": (2, 5)},
    "evit": {"keep_rate": 0.6, "prune_layers": (2, 5)},
    "tome": {"r": 4},
    "rajni": {"gamma": 0.5, "min_tokens": 5},
    "ats": {"prune_layers": (2, 5), "max_tokens": (40, 20)},
    "ppt": {"r": 10, "prune_layers": (2, 5, 6)},
}
TRAINING_FREE = [n for n in methods.names() if methods.get(n).training != "required"]
ADAPTIVE: dict[str, Any] = {"gamma": 0.5, "min_tokens": 5, "budget": "image"}


@cache
def pruned(name: str) -> nn.Module:
    return methods.prune(vit(), name, calibration=images(4, seed=9), **SETTINGS[name])


def test_every_training_free_method_is_counted_here() -> None:
    assert set(SETTINGS) == set(TRAINING_FREE)


# --- MACs


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("deit_small_patch16_224", 4.608),
        ("vit_base_patch16_224", 17.583),
        ("deit_base_distilled_patch16_224", 17.676),
    ],
)
def test_published_models_cost_what_is_published(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found = macs(model)
    assert isinstance(found, float)
    assert round(found / 1e9, 3) == gmacs
    assert macs(Recipe().build(model)) == found
    assert recipe_macs(Recipe(), methods.model_shape(model)) == (found, found)


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_closed_form_is_fvcores_count(name: str) -> None:
    model, batch = pruned(name), images(2)
    counted = fvcore_macs(model, batch)
    assert macs(model, batch) == pytest.approx(counted, rel=1e-3)
    assert name == "dense" or macs(model, batch) < 0.99 * macs(vit())


def layer_norm_macs(model: nn.Module, batch: Tensor) -> int:
    """5 an element of what every LayerNorm is given, an image."""
    seen: list[int] = []
    hooks = [
        m.register_forward_hook(lambda _m, given, _out: seen.append(given[0].numel()))
        for m in model.modules()
        if isinstance(m, nn.LayerNorm)
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return 5 * sum(seen) // len(batch)


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_closed_form_is_torchs_count_and_the_layer_norms(name: str) -> None:
    model, batch = pruned(name), images(2)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(batch)
        norms = layer_norm_macs(model, batch)
    assert macs(model, batch) == counter.get_total_flops() / 2 / len(batch) + norms


def by_hand(counts: list[int], rows: list[bool]) -> int:
    """The small ViT with one class token; `counts` patches left after each block, dropped after
    the MLP; `rows`: whether the class row is computed in that block.
    """
    c, hidden, n = 64, 128, 64
    total = 64 * c * 3 * 8 * 8
    for left, row in zip(counts, rows, strict=True):
        t = n + 1
        total += t * 5 * c + t * c * 3 * c + 2 * t * t * c + t * c * c
        total += t * 5 * c + 2 * t * c * hidden
        total += t * c if row else 0
        n = left
    return total + (n + 1) * 5 * c + c * 10


def test_the_hand_count_is_the_dense_models() -> None:
    assert by_hand([64] * 12, [False] * 12) == macs(vit())


def test_an_adaptive_recipe_needs_images_and_says_so() -> None:
    model = methods.prune(vit(), "rajni", **ADAPTIVE)
    with pytest.raises(BadInput, match=r"rajni .*depends on the images: give images="):
        macs(model)
    low, high = recipe_macs(recipe_of(model), methods.model_shape(model))
    assert low < high


def test_an_adaptive_batch_costs_its_padding() -> None:
    model, batch = methods.prune(vit(), "rajni", **ADAPTIVE), images(6)
    with torch.inference_mode():
        _, trace = model(batch, trace=True)
    each = torch.stack(trace.tokens, dim=1).sub(1)
    assert len({tuple(row) for row in each.tolist()}) > 1, "the images must differ in their counts"

    def cost(counts: list[int]) -> int:
        return by_hand(counts, [n > ADAPTIVE["min_tokens"] for n in [64, *counts[:-1]]])

    padded = each.amax(dim=0).tolist()
    assert padded_counts(trace.tokens, 1) == tuple(padded)
    assert macs(model, batch) == cost(padded)
    alone = [macs(model, image[None]) for image in batch]
    assert alone == [cost(row) for row in each.tolist()]
    assert np.mean(alone) < macs(model, batch)
    low, high = recipe_macs(recipe_of(model), methods.model_shape(model))
    assert low <= min(alone) and macs(model, batch) <= high


def test_images_change_nothing_where_the_schedule_is_fixed() -> None:
    assert macs(pruned("tome"), images(3)) == macs(pruned("tome"))


def test_a_plain_timm_model_is_the_dense_recipe() -> None:
    assert recipe_of(vit()) == Recipe() == recipe_of(pruned("dense"))
    assert recipe_of(pruned("topk")) == Recipe.of("topk", **SETTINGS["topk"])


# --- parameters and memory


def test_parameters() -> None:
    with torch.device("meta"):
        assert parameters(timm.create_model("deit_small_patch16_224")) == 22_050_664
    assert parameters(pruned("topk")) == parameters(vit())
    # a smaller input has fewer position embeddings: 25 of 64
    assert parameters(vit()) - parameters(pruned("resize")) == (64 - 25) * 64


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
    assert peaks[0] > (4 * parameters(vit()) + 4 * 10) / 1e6
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


# --- latency


@pytest.mark.parametrize("n", [1, 5, 6, 8, 9, 10, 21, 26, 30, 31, 75, 200, 501])
def test_median_interval_covers_by_the_exact_binomial_and_no_wider(n: int) -> None:
    low, high = median_interval(np.random.default_rng(n).permutation(n).astype(float))
    assert low + high == n - 1, "as many values above as below"
    left_out = int(low)

    def coverage(k: int) -> float:
        return 1 - 2 * binom.cdf(k, n, 0.5)

    if n < 6:
        assert left_out == 0, "no interval of so few holds 95 %"
        return
    assert coverage(left_out) >= 0.95
    assert coverage(left_out + 1) < 0.95


def test_median_interval_covers_by_simulation() -> None:
    rng, runs = np.random.default_rng(0), 4000
    held = 0
    for sample in rng.exponential(size=(runs, 30)):
        low, high = median_interval(sample)
        held += low <= math.log(2) <= high
    exact = 1 - 2 * binom.cdf(9, 30, 0.5)
    # four standard deviations of so many runs
    assert held / runs == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / runs))


class Logged(nn.Module):
    """Writes its name down whenever it is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.log.append(self.name)
        return x.sum()


def test_candidate_and_dense_take_turns_after_a_warm_up() -> None:
    log: list[str] = []
    found = latency(Logged("c", log), Logged("d", log), images(2), rounds=4, warmup=3)
    assert "".join(log) == "cd" * 3 + "cd" + "dc" + "cd" + "dc"
    assert found.rounds == 4


def test_a_latency_says_what_it_is() -> None:
    found = latency(pruned("tome"), vit(), images(2), rounds=8, warmup=1)
    assert 0 < found.p50_ms <= found.p95_ms and found.dense_p50_ms > 0
    assert 0 < found.speedup_low <= found.speedup <= found.speedup_high
    assert found.target == {
        "device": "cpu", "runtime": "eager", "dtype": "float32", "batch": 2,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert target_of(images(3).to(torch.bfloat16))["dtype"] == "bfloat16"
    assert device_name("cpu") == "cpu"


def test_a_latency_needs_a_round() -> None:
    with pytest.raises(BadInput, match="at least one round, got 0"):
        latency(vit(), vit(), images(1), rounds=0)
