"""MACs in closed form against published tables, two other counters and counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.refusals import refused
from tests.search.measure.methods_measured import ADAPTIVE, SETTINGS, TRAINING_FREE, pruned
from tests.search.small import images, vit
from vitpareto import methods
from vitpareto.methods import Recipe, recipe_of
from vitpareto.search.measure import macs
from vitpareto.search.measure.closed_form import padded_counts, recipe_macs
from vitpareto.search.measure.fvcore_macs import fvcore_macs


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


def test_an_adaptive_recipe_without_images_is_refused() -> None:
    model = methods.prune(vit(), "rajni", **ADAPTIVE)
    with refused("missing", name="images"):
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
