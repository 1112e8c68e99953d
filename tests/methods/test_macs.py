"""Closed-form MACs against fvcore's count of the traced forward, and against published figures."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, create_conv2d
from torch import Tensor, nn

from tests.methods.method_settings import CASES, COVERING, PAIRS, Case, pairs, pruned
from tests.methods.tiny_models import dense, hybrid, images
from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe
from vitpareto.search.measure import macs
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.measure.fvcore_macs import fvcore_macs

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


class Told(nn.Module):
    """The model with its figures among its outputs: tracing drops what no output needs, such as the
    class row of an image that loses no patch, though it is computed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        logits, trace = self.model(batch, trace=True)
        return logits, *(figure for block in trace.figures for figure in block.values())


#: tracing is slow; the controls' arithmetic is that of any staged method
COUNTED = [
    (kind, case)
    for kind, case in PAIRS
    if not methods.get(case.method).control or kind in ("class", "map")
]


@pairs(COUNTED, fast=COVERING)
def test_the_closed_form_is_what_fvcore_counts(kind, case: Case):
    reduced, batch = pruned(kind, case), images(dense(kind), 1)
    # not an approximation: every term has its place, so no tolerance but the float's
    assert macs(reduced, batch) == pytest.approx(fvcore_macs(Told(reduced), batch), rel=1e-9)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_stem_with_batch_norm(affine, own):
    """MobileCLIP's and ResNet-D's stems. Without running statistics it goes by the batch's own."""
    norm = partial(BatchNormAct2d, track_running_stats=not own)
    model = hybrid(norm_layer=norm, conv_layer=create_conv2d).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not affine:
            module.weight = module.bias = None
    assert macs(model) == fvcore_macs(model, images(model, 1))


@pytest.mark.parametrize("kind", ["class", "avg", "map"])
@pytest.mark.parametrize("name", ["ats-caps", "rajni-image"])
def test_a_padded_batch_costs_its_padding(kind, name):
    case = next(c for c in CASES if str(c) == name)
    reduced, batch = pruned(kind, case), images(dense(kind), 3)
    assert macs(reduced, batch) == pytest.approx(fvcore_macs(Told(reduced), batch), rel=1e-9)


def dims(name: str) -> ModelShape:
    with torch.device("meta"):
        return methods.model_shape(timm.create_model(name, pretrained=False))


@pytest.mark.parametrize(
    "name, giga",
    [
        ("deit_small_patch16_224", 4.608),
        ("vit_base_patch16_224", 17.583),
        ("deit_base_distilled_patch16_224", 17.676),
    ],
)
def test_dense_figures(name, giga):
    shape = dims(name)
    assert shape.macs(shape.dense_counts(), "mid-block") / 1e9 == pytest.approx(giga, abs=5e-4)


def thop(shape: ModelShape, counts: tuple[int, ...], site: str = "mid-block") -> int:
    """As TRAM's table counts: linear layers, LayerNorm at 4 an element, a softmax at 3 n - 1 a row;
    never QK^T and AV.
    """
    total = shape.stem + shape.tail
    before = shape.patches
    for block, after in zip(shape.blocks, counts, strict=True):
        n = before + shape.prefix
        m = n if site == "after-block" else after + shape.prefix
        total += n * block.attn + m * block.mlp - (n + m) * shape.dim
        total += block.heads * n * (3 * n - 1)
        before = after
    return total + (before + shape.prefix) * 4 * shape.dim


THOP = [
    ("vit_base_patch16_224", 1.0, 16.8808),
    ("vit_base_patch16_224", 0.75, 11.851),
    ("vit_base_patch16_224", 0.5, 8.4147),
    ("vit_small_patch16_224", 1.0, 4.2577),
    ("vit_small_patch16_224", 0.75, 2.9973),
    ("vit_small_patch16_224", 0.5, 2.1368),
]


@pytest.mark.parametrize("name, rate, giga", THOP)
def test_topk_costs_what_its_table_says(name, rate, giga):
    shape, declared = dims(name), methods.get("topk")
    params = declared.check({"keep_rate": rate, "prune_layers": [3, 6, 9]}, shape)
    counts = declared.counts(params, shape)
    # 0.4 M of theirs (0.02 % at the smallest) are not ours: their image normalisation, we think
    assert thop(shape, counts) / 1e9 == pytest.approx(giga, rel=5e-4)


@pytest.mark.parametrize(
    "name, figures",
    [("vit_base_patch16_224", (11.4968, 7.923)), ("vit_small_patch16_224", (2.9087, 2.0136))],
)
def test_patchmerger_costs_what_trams_table_says(name, figures):
    """Its PatchMerger has no class token."""
    shape, declared = dataclasses.replace(dims(name), prefix=0), methods.get("patchmerger")
    for preset, giga in zip(declared.presets, figures, strict=True):
        params = declared.preset(preset, shape)
        counts = declared.counts(params, shape)
        total, before = thop(shape, counts, "after-block"), (196, *counts[:-1])
        for block in params["prune_layers"]:
            n, m = before[block], counts[block]
            total += 4 * n * shape.dim + m * (3 * n - 1)
        # the 0.4 M of theirs again
        assert total / 1e9 == pytest.approx(giga, rel=5e-4)


@pytest.mark.parametrize(
    "name, figures",
    [
        ("deit_base_distilled_patch16_224", ("12.30", "9.34")),
        ("deit_small_distilled_patch16_224", ("3.20", "2.42")),
    ],
)
def test_tnt_costs_what_its_readme_says(name, figures):
    shape, declared = dims(name), methods.get("tnt")
    for preset, giga in zip(declared.presets, figures, strict=True):
        recipe = Recipe.of("tnt", **declared.preset(preset, shape))
        low, high = recipe_macs(recipe, shape)
        assert low == high
        assert f"{low / 1e9:.2f}" == giga
