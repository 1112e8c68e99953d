"""Closed-form MACs against fvcore's count of the traced forward, and against published figures."""

from __future__ import annotations

import pytest
import timm
import torch
from method_settings import CASES, PAIRS, Case, pruned
from tiny_models import dense, images
from torch import Tensor, nn

import methods
from methods import ModelShape
from search.cost import fvcore_macs, macs

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


@pytest.mark.parametrize("kind, case", COUNTED, ids=[f"{kind}-{case}" for kind, case in COUNTED])
def test_the_closed_form_is_what_fvcore_counts(kind, case: Case):
    reduced, batch = pruned(kind, case), images(dense(kind), 1)
    # not an approximation: every term has its place, so no tolerance but the float's
    assert macs(reduced, batch) == pytest.approx(fvcore_macs(Told(reduced), batch), rel=1e-9)


@pytest.mark.parametrize("kind", ["class", "avg", "map"])
def test_a_padded_batch_costs_its_padding(kind):
    case = next(c for c in CASES if str(c) == "rajni-image")
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


def thop(shape: ModelShape, counts: tuple[int, ...]) -> int:
    """As TRAM's table counts: linear layers, LayerNorm at 4 an element, a softmax at 3 n - 1 a row;
    never QK^T and AV.
    """
    total = shape.stem + shape.tail
    before = shape.patches
    for block, after in zip(shape.blocks, counts, strict=True):
        n, m = before + shape.prefix, after + shape.prefix
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
