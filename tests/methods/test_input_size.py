"""Models at another input size than the one that they were built for."""

from __future__ import annotations

import copy
from functools import partial

import torch
from timm.models.deit import VisionTransformerDistilled

from tests.methods.method_settings import FIRST, PAIRS, Case, logits, pairs, recorded
from tests.methods.tiny_models import dense, images, vit
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code

#: how these kinds are built, at any size
SIZED = {
    "class": vit,
    "distilled": partial(vit, VisionTransformerDistilled, num_heads=4),
    "registers": partial(vit, reg_tokens=3, no_embed_class=True, init_values=0.5),
    "map": partial(vit, class_token=False, global_pool="map"),
}
SIZED_PAIRS = [(kind, case) for kind, case in PAIRS if kind in SIZED and case in FIRST]


@pairs(SIZED_PAIRS, fast=[(kind, case) for kind, case in SIZED_PAIRS if kind == "registers"])
def test_set_input_size_before_pruning(kind, case: Case):
    """A model given another input size before pruning is the model built at that size."""
    resized = copy.deepcopy(dense(kind))
    resized.set_input_size(img_size=(48, 64))
    built = SIZED[kind](img_size=(48, 64)).double().eval()
    built.load_state_dict(resized.state_dict())
    shape, batch = methods.model_shape(built), images(built, 2)
    assert shape == methods.model_shape(resized)
    assert shape.grid == (6, 8)
    expected, trace = recorded(case.build(built), batch)
    pruned = case.build(resized)
    out, own = recorded(pruned, batch)
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(own.group, trace.group, strict=True))
    torch.testing.assert_close(logits(pruned, batch[1:])[0], out[1], rtol=0, atol=1e-10)
    params = methods.get(case.method).check(case.params(shape), shape)
    counts = methods.get(case.method).counts(params, shape)
    if counts is not None and methods.get(case.method).kind == "tokens":
        assert [t.tolist() for t in own.tokens] == [[n + shape.prefix] * 2 for n in counts]


def test_another_image_size_is_refused_if_the_schedule_is_fixed():
    model = dense("dynamic")
    larger = torch.zeros(1, 3, 48, 48, dtype=torch.float64)
    assert logits(methods.prune(model, "dense"), larger).shape == (1, 7)
    with refused(Code.MISMATCH, name="images", got=36, expected=16):
        methods.prune(model, "topk", keep_rate=0.5)(larger)
