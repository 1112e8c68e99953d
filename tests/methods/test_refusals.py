"""What cannot be done is refused by name, with the reason and what would be accepted."""

from __future__ import annotations

import re

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


ITSELF = "accepted is timm's VisionTransformer or VisionTransformerDistilled itself"
A_BLOCK = "accepted is timm.models.vision_transformer.Block"
REFUSED = {
    "eva": (by_name("eva02_tiny_patch14_224"), f"Eva cannot be pruned: its class .*Eva, {ITSELF}"),
    "beit": (by_name("beit_base_patch16_224"), "Beit cannot be pruned"),
    "swin": (by_name("swin_tiny_patch4_window7_224"), "SwinTransformer cannot be pruned"),
    "resnet": (by_name("resnet10t"), "ResNet cannot be pruned"),
    "relpos": (by_name("vit_relpos_small_patch16_224"), "VisionTransformerRelPos cannot be pruned"),
    "not timm's": (lambda: torch.nn.Linear(2, 2), "Linear cannot be pruned"),
    "subclass": (lambda: tiny(OwnTransformer), rf"class is \S+\.OwnTransformer, {ITSELF}"),
    "post-norm": (lambda: tiny(block_fn=ResPostBlock), rf"block 0 is \S+\.ResPostBlock, {A_BLOCK}"),
    "parallel": (lambda: tiny(block_fn=ParallelScalingBlock), "block 0 is .*ParallelScalingBlock"),
    "things": (lambda: tiny(block_fn=ParallelThingsBlock), "block 0 is .*ParallelThingsBlock"),
    "own block": (lambda: tiny(block_fn=OwnBlock), "block 0 is .*OwnBlock"),
    "own attention": (lambda: tiny(attn_layer=OwnAttention), "attention in block 0 .*OwnAttention"),
    "rope": (lambda: tiny(attn_layer=AttentionRope), "attention in block 0 is .*AttentionRope"),
    "diff": (lambda: tiny(attn_layer=DiffAttention), "attention in block 0 is .*DiffAttention"),
    "patch dropout": (lambda: tiny(patch_drop_rate=0.1), "patch_drop is .*PatchDropout"),
    "max": (lambda: tiny(global_pool="max"), "pooling is 'max', accepted is one of 'token'"),
    "avgmax": (lambda: tiny(global_pool="avgmax"), "pooling is 'avgmax'"),
    "prr": (lambda: tiny(global_pool="prr"), "pooling is 'prr'"),
    "no pooling": (lambda: tiny(global_pool=""), "pooling is ''"),
    "positions": (with_positions, "adds a position to every token slot"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_would_be_wrong_are_refused(name):
    build, said = REFUSED[name]
    model = build()
    with pytest.raises(UnsupportedModel, match=said):
        methods.check_supported(model)
    with pytest.raises(UnsupportedModel, match=said):
        methods.prune(model, "topk", keep_rate=0.5)
    with pytest.raises(UnsupportedModel, match=said):
        methods.model_shape(model)


def test_one_wrong_block_among_right_ones_is_found():
    model = tiny()
    model.blocks[1] = ResPostBlock(32, 2)
    with pytest.raises(UnsupportedModel, match="block 1 is"):
        methods.check_supported(model)


FOUR = "the model's blocks are 0 to 3"
WRONG = [
    ("tomee", {"r": 1}, "unknown method 'tomee': did you mean 'tome'?"),
    ("xyz", {}, "unknown method 'xyz'; known: ats, centre, dense, "),
    ("tome", {"rr": 1}, "tome has no parameter 'rr'"),
    ("topk", {"keep_rat": 0.5}, "topk has no parameter 'keep_rat': did you mean 'keep_rate'?"),
    ("dense", {"r": 1}, "dense has no parameter 'r'; known: none"),
    ("tome", {}, "tome needs r: a whole number >= 0, or a list of them, one a block"),
    ("tome", {"r": -1}, "tome.r is -1: accepted is a whole number >= 0"),
    ("tome", {"r": 1.5}, "tome.r is 1.5: accepted is"),
    ("tome", {"r": True}, "tome.r is True: accepted is"),
    ("tome", {"r": "2"}, "tome.r is '2': accepted is"),
    ("tome", {"r": [1, 2]}, "tome.r has 2 entries: the model has 4 blocks"),
    ("tome", {"r": 1, "inflection": 2}, "tome.inflection is 2: accepted is a number, -1 <="),
    ("tome", {"r": 1, "prop_attn": 1}, "tome.prop_attn is 1: accepted is one of True, False"),
    ("tome", {"r": 1, "prop_attn": "yes"}, "tome.prop_attn is 'yes': accepted is one of True"),
    ("tome", {"r": 1, "counts": [9] * 4}, "tome takes counts or r and inflection, not both"),
    ("tome", {"counts": [7] * 4}, "tome.counts merges 9 of 16 patches in block 0: .* at most 8"),
    ("topk", {"keep_rate": 0}, "topk.keep_rate is 0: accepted is a number, 0 < keep_rate <= 1"),
    ("topk", {"keep_rate": 1.1}, "topk.keep_rate is 1.1: accepted is"),
    ("topk", {"keep_rate": float("nan")}, "topk.keep_rate is nan: accepted is"),
    ("topk", {"keep_rate": 0.5, "prune_layers": [4]}, f"topk.prune_layers names block 4: {FOUR}"),
    ("topk", {"keep_rate": 0.5, "prune_layers": [2, 1]}, "accepted is a list of increasing block"),
    ("topk", {"keep_rate": 0.5, "prune_layers": [-1]}, r"topk.prune_layers is \[-1\]"),
    ("topk", {"keep_rate": 0.5, "prune_layers": 2}, "topk.prune_layers is 2: accepted is a list"),
    ("topk", {"keep_rate": 0.05, "prune_layers": [1]}, "topk leaves no patch after block 1"),
    ("topk", {"counts": [9] * 3}, "topk.counts has 3 entries: the model has 4 blocks"),
    ("topk", {"counts": [17] * 4}, "topk.counts starts with 17 patches: the model has 16"),
    ("topk", {"counts": [3, 4, 4, 4]}, "accepted is a list with the patches left after each block"),
    ("topk", {"counts": [3, 2, 1, 0]}, "never increasing, at least 1"),
    ("topk", {"counts": [9] * 4, "keep_rate": 0.5}, "takes counts or keep_rate and prune_layers"),
    ("random", {"keep_rate": 0.5, "seed": -1}, "random.seed is -1"),
    ("rajni", {"gamma": 0.1, "min_tokens": 4}, r"rajni with .* needs calibration images: give"),
    ("rajni", {"gamma": -1, "min_tokens": 4}, "rajni.gamma is -1: accepted is a number, 0 <= "),
    ("rajni", {"gamma": 1, "min_tokens": 17}, "rajni.min_tokens is 17: the model has 16 patches"),
    ("rajni", {"gamma": 1, "min_tokens": 0}, "rajni.min_tokens is 0: accepted is a whole number"),
    ("rajni", {"gamma": 1, "min_tokens": 4, "prune_layers": [5]}, f"names block 5: {FOUR}"),
    ("rajni", {"gamma": 1, "min_tokens": 4, "budget": "images"}, "did you mean 'image'?"),
    ("rajni", {"counts": [9] * 4, "budget": "image"}, "counts is for budget=calibrated"),
    ("resize", {"size": 30}, "a multiple of the patch height 8 up to the model's own 32"),
    ("resize", {"size": 40}, "resize.size is 40: accepted is a multiple of the patch height 8"),
]


@pytest.mark.parametrize("method, params, said", WRONG, ids=[f"{m}-{p}" for m, p, _ in WRONG])
def test_settings_that_make_no_sense_are_refused(method, params, said):
    with pytest.raises(BadInput, match=said.replace("?", r"\?")):
        methods.prune(dense("class"), method, **params)


def test_calibration_without_an_image():
    with pytest.raises(BadInput, match="at least one calibration image, got none"):
        methods.prune(dense("class"), "rajni", calibration=[], gamma=0.1, min_tokens=4)


def test_calibration_is_asked_for_only_where_it_decides():
    pruned = methods.prune(dense("class"), "rajni", gamma=0, min_tokens=4)
    _, trace = pruned(images(dense("class")), trace=True)
    assert [t.tolist() for t in trace.tokens] == [[17] * 4] * 4


def test_numbers_of_other_libraries_are_numbers():
    params = {"keep_rate": np.float32(0.5), "prune_layers": [np.int64(1)]}
    pruned = methods.prune(dense("class"), "topk", **params)
    assert "numpy" not in pruned.recipe.to_yaml()
    assert pruned(images(dense("class"))).shape == (4, 7)


RECIPES = [
    ("a: [", "the recipe is not YAML"),
    ("- 1", r"a recipe is a mapping with structure and tokens, got \[1\]"),
    ("token: {method: tome, r: 1}", "no part 'token': did you mean 'tokens'"),
    ("1: {method: tome}", "a recipe has no part 1; known: structure, tokens"),
    ("tokens: tome", "recipe.tokens needs a method and its parameters, got 'tome'"),
    ("tokens: {r: 1}", "recipe.tokens needs a method"),
    ("tokens: {method: tome, 1: 2}", "tome has no parameter 1"),
    ("tokens: {method: tom, r: 1}", "unknown method 'tom': did you mean 'tome'"),
    ("tokens: {method: resize, size: 24}", "resize is a structure method: it cannot be the tokens"),
    ("structure: {method: tome, r: 1}", "tome is a tokens method: it cannot be the structure"),
    ("tokens: {method: tome, r: [1, x]}", r"tome.r is \[1, 'x'\]"),
    ("tokens: !!python/object:os.system {}", "the recipe is not YAML"),
]


@pytest.mark.parametrize("text, said", RECIPES, ids=[text for text, _ in RECIPES])
def test_recipes_that_are_none(text, said):
    with pytest.raises(BadInput, match=said):
        Recipe.from_yaml(text)


def test_weights_that_do_not_fit():
    model = dense("class")
    own = model.state_dict()
    wrong = {**own, "head.weight": torch.zeros(8, 32), "else": torch.zeros(1)}
    del wrong["cls_token"]
    said = (
        "the weights do not fit the model; missing: cls_token; unknown: else; "
        "wrong shape: head.weight is (8, 32), the model's (7, 32)"
    )
    with pytest.raises(BadInput, match=re.escape(said)):
        methods.prune(model, "topk", keep_rate=0.5, weights=wrong)
    pruned = methods.prune(model, "topk", keep_rate=0.5, weights={k: v + 1 for k, v in own.items()})
    assert torch.equal(pruned.state_dict()["cls_token"], own["cls_token"] + 1)


def test_a_reduced_model_is_not_reduced_again():
    """Its first reduction would silently be gone."""
    once = methods.prune(dense("class"), "topk", keep_rate=0.5)
    with refused(Code.CONFLICT, name="model", got=str(once.recipe)):
        methods.prune(once, "tome", r=2)
    dense_twice = methods.prune(methods.prune(dense("class"), "dense"), "tome", r=2)
    assert dense_twice.recipe.method == "tome"


def test_a_reduced_model_has_no_intermediates():
    """timm's would run the blocks without the reduction."""
    pruned = methods.prune(dense("class"), "topk", keep_rate=0.5)
    with pytest.raises(NotImplementedError, match="trace=True"):
        pruned.forward_intermediates(images(dense("class")))


def test_a_pruned_model_keeps_its_number_of_patches():
    model = dense("class")
    pruned = methods.prune(model, "topk", keep_rate=0.5, prune_layers=(0,))
    with pytest.raises(BadInput, match=r"already reduced \(topk .*then prune"):
        pruned.set_input_size(img_size=48)
