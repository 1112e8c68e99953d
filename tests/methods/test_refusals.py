"""Unsupported models and impossible settings are refused, with a code and details."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)

from tests.methods.tiny_models import dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import BadInput, Code, Recipe, UnsupportedModel


class OwnTransformer(VisionTransformer):
    """A subclass may compute anything."""


class OwnAttention(Attention):
    """So may this."""


class OwnBlock(Block):
    """And this."""


def tiny(kind=VisionTransformer, **settings):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return kind(**{**small, "num_classes": 3, **settings})


def by_name(name):
    def build():
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False)

    return build


def with_positions():
    model = tiny(class_token=False, global_pool="map")
    model.attn_pool = AttentionPoolLatent(32, num_heads=2, pos_embed="abs", feat_size=16)
    return model


IN_0_1 = "a number in (0, 1]"
#: kinds of model that are refused: how to build one, and the part at fault
REFUSED = {
    "eva": (by_name("eva02_tiny_patch14_224"), "class"),
    "beit": (by_name("beit_base_patch16_224"), "class"),
    "swin": (by_name("swin_tiny_patch4_window7_224"), "class"),
    "resnet": (by_name("resnet10t"), "class"),
    "relpos": (by_name("vit_relpos_small_patch16_224"), "class"),
    "not timm's": (lambda: torch.nn.Linear(2, 2), "class"),
    "subclass": (lambda: tiny(OwnTransformer), "class"),
    "post-norm": (lambda: tiny(block_fn=ResPostBlock), "block 0"),
    "parallel": (lambda: tiny(block_fn=ParallelScalingBlock), "block 0"),
    "things": (lambda: tiny(block_fn=ParallelThingsBlock), "block 0"),
    "own block": (lambda: tiny(block_fn=OwnBlock), "block 0"),
    "own attention": (lambda: tiny(attn_layer=OwnAttention), "attention in block 0"),
    "rope": (lambda: tiny(attn_layer=AttentionRope), "attention in block 0"),
    "diff": (lambda: tiny(attn_layer=DiffAttention), "attention in block 0"),
    "patch dropout": (lambda: tiny(patch_drop_rate=0.1), "patch_drop"),
    "max": (lambda: tiny(global_pool="max"), "pooling"),
    "avgmax": (lambda: tiny(global_pool="avgmax"), "pooling"),
    "prr": (lambda: tiny(global_pool="prr"), "pooling"),
    "no pooling": (lambda: tiny(global_pool=""), "pooling"),
    "positions": (with_positions, "pooling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused(name):
    build, part = REFUSED[name]
    model = build()
    for call in (
        lambda: methods.check_supported(model),
        lambda: methods.prune(model, "topk", keep_rate=0.5),
        lambda: methods.model_shape(model),
    ):
        with refused(Code.UNSUPPORTED, UnsupportedModel, model=type(model).__name__, part=part):
            call()


def test_one_wrong_block_among_right_ones_is_found():
    model = tiny()
    model.blocks[1] = ResPostBlock(32, 2)
    with refused(Code.UNSUPPORTED, UnsupportedModel, part="block 1"):
        methods.check_supported(model)


RAJNI = {"gamma": 1, "min_tokens": 4}
#: on 4 blocks and 16 patches: method, parameters, code, and the details of the error
WRONG = [
    ("tomee", {"r": 1}, "unknown-name", {"name": "tomee"}),
    ("tome", {"rr": 1}, "unknown-name", {"name": "rr", "where": "tome"}),
    ("topk", {"keep_rat": 0.5}, "unknown-name", {"name": "keep_rat", "where": "topk"}),
    ("dense", {"r": 1}, "unknown-name", {"name": "r", "where": "dense", "accepted": []}),
    ("tome", {}, "missing", {"name": "r", "where": "tome"}),
    ("tome", {"r": -1}, "out-of-range", {"name": "r", "where": "tome", "got": -1}),
    ("tome", {"r": 1.5}, "wrong-type", {"name": "r", "got": 1.5}),
    ("tome", {"r": True}, "wrong-type", {"name": "r", "got": True}),
    ("tome", {"r": "2"}, "wrong-type", {"name": "r", "got": "2"}),
    ("tome", {"r": [1, 2]}, "mismatch", {"name": "r", "got": 2, "expected": 4}),
    ("tome", {"r": 1, "inflection": 2}, "out-of-range", {"name": "inflection", "got": 2}),
    ("tome", {"r": 1, "prop_attn": 1}, "out-of-range", {"name": "prop_attn", "got": 1}),
    ("tome", {"r": 1, "prop_attn": "yes"}, "out-of-range", {"name": "prop_attn", "got": "yes"}),
    ("tome", {"r": 1, "counts": [9] * 4}, "conflict", {"name": "counts", "where": "tome"}),
    ("tome", {"counts": [7] * 4}, "out-of-range", {"block": 0, "got": 9, "accepted": 8}),
    ("topk", {"keep_rate": 0}, "out-of-range", {"name": "keep_rate", "accepted": IN_0_1}),
    ("topk", {"keep_rate": 1.1}, "out-of-range", {"name": "keep_rate", "got": 1.1}),
    ("topk", {"keep_rate": float("nan")}, "wrong-type", {"name": "keep_rate"}),
    ("topk", {"keep_rate": 0.5, "prune_layers": [4]}, "out-of-range", {"got": 4, "accepted": 3}),
    ("topk", {"keep_rate": 0.5, "prune_layers": [2, 1]}, "out-of-range", {"got": [2, 1]}),
    ("topk", {"keep_rate": 0.5, "prune_layers": [-1]}, "out-of-range", {"got": [-1]}),
    ("topk", {"keep_rate": 0.5, "prune_layers": 2}, "wrong-type", {"name": "prune_layers"}),
    ("topk", {"keep_rate": 0.05, "prune_layers": [1]}, "empty", {"where": "topk", "block": 1}),
    ("topk", {"counts": [9] * 3}, "mismatch", {"name": "counts", "got": 3, "expected": 4}),
    ("topk", {"counts": [17] * 4}, "out-of-range", {"name": "counts", "accepted": 16}),
    ("topk", {"counts": [3, 4, 4, 4]}, "out-of-range", {"name": "counts", "got": [3, 4, 4, 4]}),
    ("topk", {"counts": [3, 2, 1, 0]}, "out-of-range", {"name": "counts", "got": [3, 2, 1, 0]}),
    ("topk", {"counts": [9] * 4, "keep_rate": 0.5}, "conflict", {"name": "counts"}),
    ("random", {"keep_rate": 0.5, "seed": -1}, "out-of-range", {"name": "seed", "got": -1}),
    ("rajni", RAJNI, "missing", {"name": "calibration", "where": "rajni"}),
    ("rajni", {**RAJNI, "gamma": -1}, "out-of-range", {"name": "gamma", "got": -1}),
    ("rajni", {**RAJNI, "min_tokens": 17}, "out-of-range", {"got": 17, "accepted": 16}),
    ("rajni", {**RAJNI, "min_tokens": 0}, "out-of-range", {"name": "min_tokens", "got": 0}),
    ("rajni", {**RAJNI, "prune_layers": [5]}, "out-of-range", {"got": 5, "accepted": 3}),
    ("rajni", {**RAJNI, "budget": "images"}, "out-of-range", {"name": "budget"}),
    ("rajni", {"counts": [9] * 4, "budget": "image"}, "conflict", {"name": "counts"}),
    ("resize", {"size": 30}, "out-of-range", {"name": "size", "got": 30, "accepted": 32}),
    ("resize", {"size": 40}, "out-of-range", {"name": "size", "got": 40, "accepted": 32}),
]


@pytest.mark.parametrize(
    "method, params, code, details", WRONG, ids=[f"{m}-{p}" for m, p, _, _ in WRONG]
)
def test_impossible_settings_are_refused(method, params, code, details):
    with refused(code, **details):
        methods.prune(dense("class"), method, **params)


@pytest.mark.parametrize(
    "params, nearest",
    [({"method": "tomee"}, "tome"), ({"method": "topk", "keep_rat": 1}, "keep_rate"),
     ({"method": "rajni", **RAJNI, "budget": "images"}, "image")],
)  # fmt: skip
def test_the_nearest_name_is_suggested(params, nearest):
    with pytest.raises(BadInput) as caught:
        Recipe.of(**params)
    assert caught.value.details["closest"] == nearest
    assert repr(nearest) in str(caught.value), "the message names it"


def test_calibration_without_an_image():
    with refused(Code.EMPTY, name="calibration", where="rajni"):
        methods.prune(dense("class"), "rajni", calibration=[], gamma=0.1, min_tokens=4)


def test_calibration_is_required_only_if_it_decides():
    pruned = methods.prune(dense("class"), "rajni", gamma=0, min_tokens=4)
    _, trace = pruned(images(dense("class")), trace=True)
    assert [t.tolist() for t in trace.tokens] == [[17] * 4] * 4


def test_numbers_of_other_libraries_are_numbers():
    params = {"keep_rate": np.float32(0.5), "prune_layers": [np.int64(1)]}
    pruned = methods.prune(dense("class"), "topk", **params)
    assert "numpy" not in pruned.recipe.to_yaml()
    assert pruned(images(dense("class"))).shape == (4, 7)


RECIPES = [
    ("a: [", "unreadable", {"name": "recipe"}),
    ("- 1", "wrong-type", {"name": "recipe", "got": "list"}),
    ("token: {method: tome, r: 1}", "unknown-name", {"name": "token", "where": "recipe"}),
    ("1: {method: tome}", "unknown-name", {"name": 1, "where": "recipe"}),
    ("tokens: tome", "wrong-type", {"name": "tokens", "where": "recipe", "got": "str"}),
    ("tokens: {r: 1}", "wrong-type", {"name": "tokens", "where": "recipe"}),
    ("tokens: {method: tome, 1: 2}", "unknown-name", {"name": 1, "where": "tome"}),
    ("tokens: {method: tom, r: 1}", "unknown-name", {"name": "tom"}),
    ("tokens: {method: resize, size: 24}", "conflict", {"name": "tokens", "got": "resize"}),
    ("structure: {method: tome, r: 1}", "conflict", {"name": "structure", "got": "tome"}),
    ("tokens: {method: tome, r: [1, x]}", "wrong-type", {"name": "r", "got": [1, "x"]}),
    ("tokens: !!python/object:os.system {}", "unreadable", {"name": "recipe"}),
]


@pytest.mark.parametrize("text, code, details", RECIPES, ids=[text for text, _, _ in RECIPES])
def test_invalid_recipes_are_refused(text, code, details):
    with refused(code, **details):
        Recipe.from_yaml(text)


def test_weights_that_do_not_fit():
    model = dense("class")
    own = model.state_dict()
    wrong = {**own, "head.weight": torch.zeros(8, 32), "else": torch.zeros(1)}
    del wrong["cls_token"]
    shapes = {"head.weight": ((8, 32), (7, 32))}
    with refused(Code.MISMATCH, missing=["cls_token"], unknown=["else"], shapes=shapes):
        methods.prune(model, "topk", keep_rate=0.5, weights=wrong)
    pruned = methods.prune(model, "topk", keep_rate=0.5, weights={k: v + 1 for k, v in own.items()})
    assert torch.equal(pruned.state_dict()["cls_token"], own["cls_token"] + 1)


def test_a_reduced_model_is_not_reduced_again():
    """Its first reduction would be lost silently."""
    once = methods.prune(dense("class"), "topk", keep_rate=0.5)
    with refused(Code.CONFLICT, name="model", got=str(once.recipe)):
        methods.prune(once, "tome", r=2)
    dense_twice = methods.prune(methods.prune(dense("class"), "dense"), "tome", r=2)
    assert dense_twice.recipe.method == "tome"


def test_a_reduced_model_has_no_intermediates():
    """timm's would run the blocks without the reduction."""
    pruned = methods.prune(dense("class"), "topk", keep_rate=0.5)
    with pytest.raises(NotImplementedError):
        pruned.forward_intermediates(images(dense("class")))


def test_a_pruned_model_keeps_its_number_of_patches():
    model = dense("class")
    pruned = methods.prune(model, "topk", keep_rate=0.5, prune_layers=(0,))
    with refused(Code.CONFLICT, name="model", got=str(pruned.recipe)):
        pruned.set_input_size(img_size=48)
