"""Methods with trained parts: what their settings come to, and what is refused before any image."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch

from tests.methods.method_settings import SETTINGS, Case, recorded
from tests.methods.tiny_models import dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe
from vitpareto.methods.token.tnt import distinct

TRAINED = ("dynamicvit", "patchmerger", "tnt")


@cache
def deit() -> ModelShape:
    with torch.device("meta"):
        return methods.model_shape(timm.create_model("deit_small_patch16_224", pretrained=False))


def test_presets_are_the_published_settings_on_the_published_model():
    shape = deit()
    found = {
        name: [methods.get(name).preset(p, shape) for p in methods.get(name).presets]
        for name in TRAINED
    }
    assert found["patchmerger"] == [
        {"prune_layers": (2, 5, 8), "num_tokens": (147, 110, 82)},
        {"prune_layers": (2, 5, 8), "num_tokens": (98, 49, 24)},
    ]
    assert found["dynamicvit"] == [
        {"prune_layers": (3, 6, 9), "keep_rates": (0.7, 0.49, 0.343)},
        {"prune_layers": (3, 6, 9), "keep_rates": (0.5, 0.25, 0.125)},
    ]
    assert found["tnt"] == [
        {"prune_layers": (2,), "keep_rates": (0.6,), "similarity_prune": 25},
        {"prune_layers": (2, 3, 4), "keep_rates": (0.8, 0.8, 0.8), "similarity_prune": 40},
    ]


BEYOND = {"name": "prune_layers", "got": 4, "accepted": 3}
#: on 4 blocks and 16 patches: method, parameters, code, and the details of the error
WRONG = [
    ("patchmerger", {"prune_layers": [1]}, "missing", {"name": "num_tokens"}),
    ("patchmerger", {"num_tokens": 3}, "missing", {"name": "prune_layers"}),
    ("patchmerger", {"prune_layers": [1], "num_tokens": 0}, "out-of-range", {"got": 0}),
    ("patchmerger", {"prune_layers": [1, 2], "num_tokens": [4]}, "mismatch",
     {"name": "num_tokens", "got": 1, "expected": 2}),
    ("patchmerger", {"prune_layers": [1], "num_tokens": 17}, "out-of-range",
     {"name": "num_tokens", "block": 1, "got": 17, "accepted": 16}),
    ("patchmerger", {"prune_layers": [1, 2], "num_tokens": [4, 5]}, "out-of-range",
     {"block": 2, "got": 5, "accepted": 4}),
    ("patchmerger", {"prune_layers": [4], "num_tokens": 2}, "out-of-range", BEYOND),
    ("dynamicvit", {"prune_layers": [1], "keep_rates": 0.5}, "wrong-type", {"got": 0.5}),
    ("dynamicvit", {"prune_layers": [1], "keep_rates": [0]}, "out-of-range", {"got": [0]}),
    ("dynamicvit", {"prune_layers": [1], "keep_rates": [1.1]}, "out-of-range", {"got": [1.1]}),
    ("dynamicvit", {"prune_layers": [1], "keep_rates": "0.5"}, "wrong-type", {"got": "0.5"}),
    ("dynamicvit", {"prune_layers": [1], "keep_rates": []}, "mismatch",
     {"name": "keep_rates", "got": 0, "expected": 1}),
    ("dynamicvit", {"prune_layers": [0, 1], "keep_rates": [0.5, 0.4]}, "out-of-range",
     {"name": "prune_layers", "got": [0, 1]}),
    ("dynamicvit", {"prune_layers": [1, 2], "keep_rates": [0.5, 0.6]}, "out-of-range",
     {"name": "keep_rates", "got": [0.5, 0.6]}),
    ("dynamicvit", {"prune_layers": [4], "keep_rates": [0.5]}, "out-of-range", BEYOND),
    ("dynamicvit", {"prune_layers": [2], "keep_rates": [0.05]}, "empty", {"block": 2}),
    ("tnt", {"prune_layers": [1], "keep_rates": [0.5, 0.5]}, "mismatch", {"got": 2}),
    ("tnt", {"prune_layers": [4], "keep_rates": [0.5]}, "out-of-range", BEYOND),
    ("tnt", {"prune_layers": [1], "keep_rates": [0.05]}, "empty", {"block": 1}),
    ("tnt", {"prune_layers": [1], "keep_rates": [0.5], "similarity_prune": -1}, "out-of-range",
     {"name": "similarity_prune", "got": -1}),
    ("tnt", {"prune_layers": [1], "keep_rates": [0.75], "similarity_prune": 5}, "out-of-range",
     {"name": "similarity_prune", "got": 5, "accepted": 4}),
    ("tnt", {"prune_layers": [1], "keep_rates": [0.25], "similarity_prune": 5}, "out-of-range",
     {"accepted": 4}),
    ("tnt", {"prune_layers": [1, 2], "keep_rates": [1, 1], "similarity_prune": 9}, "out-of-range",
     {"accepted": 8}),
    ("tnt", {"prune_layers": [], "keep_rates": [], "similarity_prune": 1}, "out-of-range",
     {"accepted": 0}),
]  # fmt: skip


@pytest.mark.parametrize(
    "method, params, code, details", WRONG, ids=[f"{m}-{p}" for m, p, _, _ in WRONG]
)
def test_impossible_settings_are_refused(method, params, code, details):
    with refused(code, where=method, **details):
        methods.prune(dense("class"), method, **params)


def of(method, layers, **params):
    return Recipe.of(method, prune_layers=layers, **params)


SAME = [
    [Recipe(), of("patchmerger", [], num_tokens=3), of("dynamicvit", [], keep_rates=[]),
     of("dynamicvit", [2], keep_rates=[1]), of("tnt", [], keep_rates=[]),
     of("tnt", [1, 2], keep_rates=[1, 1])],
    [of("patchmerger", [1, 2], num_tokens=5), of("patchmerger", [1, 2], num_tokens=[5, 5])],
    # as many mixtures as patches are not the patches
    [of("patchmerger", [1], num_tokens=16)],
    [of("dynamicvit", [2], keep_rates=[0.5]), of("dynamicvit", [2], keep_rates=[0.51])],
    # another predictor decides: the second
    [of("dynamicvit", [1, 2], keep_rates=[1, 0.5])],
    [of("tnt", [2], keep_rates=[0.5]), of("tnt", [2, 3], keep_rates=[0.51, 1])],
    [of("tnt", [2], keep_rates=[0.5], similarity_prune=2)],
    [of("tnt", [2, 3], keep_rates=[0.5, 1], similarity_prune=2)],
    [of("tnt", [1, 2], keep_rates=[1, 1], similarity_prune=2)],
]  # fmt: skip


def test_settings_that_make_the_same_candidate_share_a_key():
    shape = methods.model_shape(dense("class"))
    keys = [{recipe.key(shape) for recipe in recipes} for recipes in SAME]
    assert [len(found) for found in keys] == [1] * len(SAME)
    assert len(set.union(*keys)) == len(SAME)


@pytest.mark.filterwarnings("ignore::vitpareto.methods.Untrained")
def test_what_shares_a_key_and_its_weights_shares_its_logits():
    model = dense("class")
    for recipes in SAME[1:]:
        first, *others = [r.build(model) for r in recipes]
        expected, _ = recorded(first, images(model))
        for other in others:
            built = other.recipe.build(model, weights=first.state_dict())
            assert torch.equal(recorded(built, images(model))[0], expected)


@pytest.mark.parametrize("method", TRAINED)
def test_fresh_parts_are_warned_of(method):
    model = dense("class")
    recipe = Recipe.of(method, **next(iter(SETTINGS[method].values()))(methods.model_shape(model)))
    with pytest.warns(methods.Untrained) as warned:
        fresh = recipe.build(model)
    assert [w.message.method for w in warned] == [method]
    assert recorded(fresh, images(model))[0].isfinite().all()
    # no warning, which would be an error here: with weights, and where nothing is trained for
    recipe.build(model, weights=fresh.state_dict())
    methods.prune(model, method, **methods.get(method).identity)


def test_as_many_mixtures_as_patches_are_not_the_dense_model():
    model = dense("class")
    case = Case("patchmerger", "", lambda s: {"prune_layers": (1,), "num_tokens": s.patches})
    logits, trace = recorded(case.build(model), images(model))
    assert [t.tolist() for t in trace.tokens] == [[17] * 4] * 4
    assert (logits - model(images(model))).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["avg", "registers"])
def test_patchmerger_traces_each_patch_to_the_mixture_that_weighs_it_most(kind):
    model = dense(kind)
    batch, plain = images(model), methods.prune(model, "dense")
    case = Case("patchmerger", "", lambda _: {"prune_layers": (1, 2), "num_tokens": (9, 4)})
    pruned = case.build(model)
    _, trace = recorded(pruned, batch)
    with torch.no_grad():
        tokens = plain.run_block(1, plain.run_block(0, plain.embed(batch)))
        merged, weight = pruned.reduction.mergers[0](tokens.x[:, tokens.prefix :])
    first = trace.group[1]
    assert torch.equal(first, weight.argmax(dim=1))
    # and on from there: patches of one mixture stay in one
    for image, (before, after) in enumerate(zip(first, trace.group[2], strict=True)):
        for patch, mixture in enumerate(before.tolist()):
            assert (after[before == mixture] == after[patch]).all(), image
    assert merged.shape == (len(batch), 9, 32)


@pytest.mark.parametrize("patches", [16, 25, 196])
@pytest.mark.parametrize("choices", [
    {"keep_rate": rate, "first": first, "stages": stages, "spacing": 1 / 12, "similar": 0.25}
    for rate in (0.2, 0.5, 0.95) for first in (0.0, 0.5) for stages in (1, 2, 4)
])  # fmt: skip
def test_tnts_choices_resolve_to_what_is_possible(patches, choices):
    """A tiny model has no room for all that a large one has: less is similar, stages go."""
    side = int(patches**0.5)
    shape, declared = replace(deit(), grid=(side, side)), methods.get("tnt")
    params = declared.check(declared.resolve(choices, shape), shape)
    assert len(params["prune_layers"]) >= 1
    assert declared.counts(params, shape)[-1] >= 1
    assert 0 < params["similarity_prune"] <= round(patches / 4)


def test_tnt_drops_what_is_most_alike():
    """Even positions are looked at; the last of an odd number is not."""
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 7, 32, generator=draw, dtype=torch.float64)
    patches[0, 4] = 3 * patches[0, 5]  # the same direction
    patches[0, 6] = patches[0, 1]  # of two in B nothing goes
    assert sorted(distinct(patches, 1)[0].tolist()) == [0, 1, 2, 3, 5, 6]
    assert sorted(distinct(patches, 3)[0].tolist()) == [1, 3, 5, 6]
    assert sorted(distinct(patches[:, :1], 0)[0].tolist()) == [0]
    patches[0, 0] = 0.5 * patches[0, 6]
    assert sorted(distinct(patches, 2)[0].tolist()) == [1, 2, 3, 5, 6]


def test_tnt_holds_a_head_for_every_block_at_every_setting():
    shape, declared = methods.model_shape(dense("class")), methods.get("tnt")
    for layers, rates in ((), ()), ((1,), (0.5,)):
        params = declared.check({"prune_layers": layers, "keep_rates": rates}, shape)
        own = declared.reduction(params, shape).state_dict()
        assert {k: tuple(v.shape) for k, v in own.items()} == {
            f"heads.{block}.{name}": size
            for block in range(4)
            for name, size in (("weight", (1, 32)), ("bias", (1,)))
        }


def test_what_leaves_before_block_0_is_told():
    """The trace of block 0 and the cost both know of it."""
    model = dense("class")
    params = {"prune_layers": (1, 2), "keep_rates": (1.0, 1.0), "similarity_prune": 6}
    shape = methods.model_shape(model)
    _, trace = recorded(Case("tnt", "", lambda _: params).build(model), images(model))
    assert [t.tolist() for t in trace.tokens] == [[11] * 4] * 4
    assert ((trace.group[0] == -1).sum(dim=1) == 6).all()
    declared = methods.get("tnt")
    params = declared.check(params, shape)
    assert declared.entering(params, shape) == 10
    assert not declared.is_dense(params, shape)
    less = shape.macs((10,) * 4, "after-block", 10)
    assert less < shape.macs((10,) * 4, "after-block") < shape.macs((16,) * 4, "after-block")
