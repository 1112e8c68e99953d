"""Recipes: text in and out, what counts as the same candidate, structure and tokens together."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch

from tests.methods.method_settings import CASES, Case, recorded
from tests.methods.tiny_models import MODELS, dense, images, vit
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code, ModelShape, Recipe, Step


def shape(kind: str = "class") -> ModelShape:
    return methods.model_shape(dense(kind))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_yaml_gives_the_same_recipe(case: Case):
    recipe = Recipe.of(case.method, **case.params(shape()))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "tuple" not in recipe.to_yaml()
    assert recipe.method == case.method


def test_yaml_is_a_few_readable_lines():
    text = "structure: {method: resize, size: 24}\ntokens: {method: tome, r: 2, inflection: -0.5}\n"
    recipe = Recipe.from_yaml(text)
    assert recipe == Recipe(
        Step("resize", {"size": 24}),
        Step("tome", {"r": 2, "inflection": -0.5, "prop_attn": True, "counts": None}),
    )
    assert recipe.to_yaml() == (
        "structure: {method: resize, size: 24}\n"
        "tokens: {method: tome, r: 2, inflection: -0.5, prop_attn: true}\n"
    )
    assert str(recipe) == "resize size=24 tome r=2 inflection=-0.5 prop_attn=True"


@pytest.mark.parametrize(
    # a number in YAML, one in scientific notation, an octal one, and one that starts with a letter
    "digest",
    ["1234567890123456", "123456789012e345", "0123456701234567", "fedcba9876543210"],
)
@pytest.mark.parametrize("quote", ["", "'"])
def test_weights_are_text_however_they_look(digest, quote):
    text = f"tokens: {{method: tome, r: 2}}\nweights: {quote}{digest}{quote}\n"
    recipe = Recipe.from_yaml(text)
    assert recipe == replace(Recipe.of("tome", r=2), weights=digest)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["weights"] == digest
    assert str(recipe).endswith(f" weights={digest}")
    assert recipe.key(shape()) != Recipe.of("tome", r=2).key(shape())
    assert recipe.checked(shape()).weights == digest


@pytest.mark.parametrize("wrong", ["12", "'0123456789ABCDEF'", "[1]", "0.5", "x" * 16])
def test_weights_are_named_by_their_digest(wrong):
    with refused(Code.WRONG_TYPE, name="weights", where="recipe"):
        Recipe.from_yaml(f"weights: {wrong}")


def test_a_model_of_other_weights_alone():
    """A fine-tuned dense model is a recipe of weights and nothing else."""
    model = dense("class")
    state = {name: value * 1.01 for name, value in model.state_dict().items()}
    recipe = Recipe(weights=methods.weights_digest(state))
    assert str(recipe) == f"dense weights={recipe.weights}"
    assert recipe.method == "dense"
    built = recipe.build(model, weights=state)
    assert torch.equal(built.state_dict()["cls_token"], state["cls_token"])


def test_the_digest_is_of_names_types_shapes_and_bytes():
    state = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    digest = methods.weights_digest(state)
    assert digest == methods.weights_digest({"b": torch.tensor(1), "a": torch.arange(6.0)})
    assert digest == methods.weights_digest({**state, "a": torch.arange(12.0)[::2] / 2})
    others = [
        {"a": torch.arange(6.0)}, {**state, "c": torch.tensor(1)},
        {**state, "a": torch.arange(6.0).view(2, 3)}, {**state, "b": torch.tensor(2)},
        {**state, "a": torch.arange(6.0).view(torch.int32)}, {"a": state["a"], "c": state["b"]},
        {**state, "b": torch.tensor([1])},
    ]  # fmt: skip
    assert len({digest, *map(methods.weights_digest, others)}) == len(others) + 1


def test_trained_parts_are_asked_for_by_their_digest():
    model, batch = dense("class"), images(dense("class"))
    with pytest.warns(methods.Untrained):
        trained = methods.prune(model, "tnt", prune_layers=(1,), keep_rates=(0.5,))
    state = trained.state_dict()
    recipe = replace(trained.recipe, weights=methods.weights_digest(state))
    built = recipe.build(model, weights=state)
    assert built.recipe == recipe
    assert torch.equal(recorded(built, batch)[0], recorded(trained, batch)[0])
    with refused(Code.MISSING, name="weights", expected=recipe.weights):
        recipe.build(model)
    other = {**state, "cls_token": state["cls_token"] + 1}
    given = methods.weights_digest(other)
    with refused(Code.MISMATCH, name="weights", expected=recipe.weights, got=given):
        recipe.build(model, weights=other)


def test_str():
    assert str(Recipe()) == "dense"
    recipe = Recipe.of("topk", keep_rate=0.123456, prune_layers=(1, 2))
    assert str(recipe) == "topk keep_rate=0.1235 prune_layers=[1,2]"


def test_numbers_as_people_write_them():
    """YAML 1.1 reads 1e-2 as a word."""
    params = Recipe.from_yaml("tokens: {method: rajni, gamma: 1e-2, min_tokens: 4}").tokens.params
    assert params["gamma"] == 0.01


@pytest.mark.parametrize(
    "text", ["", "{}", "tokens:", "tokens: {method: dense}", "structure: null"]
)
def test_empty_is_dense(text):
    assert Recipe.from_yaml(text) == Recipe() == Recipe.of("dense")
    assert Recipe.from_yaml(text).to_dict() == {}


SAME = [
    [Recipe(), Recipe.of("tome", r=0), Recipe.of("topk", keep_rate=1, prune_layers=[2]),
     Recipe.of("random", keep_rate=0.3, prune_layers=[]),
     Recipe.of("rajni", gamma=0, min_tokens=2)],
    [Recipe.of("tome", r=2), Recipe.of("tome", r=[2, 2, 2, 2]),
     Recipe.of("tome", counts=[14, 12, 10, 8])],
    [Recipe.of("tome", r=50), Recipe.of("tome", r=16)],
    [Recipe.of("tome", r=2, prop_attn=False)],
    [Recipe.of("topk", keep_rate=0.5), Recipe.of("topk", keep_rate=0.51),
     Recipe.of("topk", keep_rate=0.5, prune_layers=[1, 2, 3]),
     Recipe.of("topk", counts=[16, 8, 4, 2])],
    [Recipe.of("centre", keep_rate=0.5)],
    [Recipe.of("random", keep_rate=0.5), Recipe.of("random", keep_rate=0.5, seed=0)],
    [Recipe.of("random", keep_rate=0.5, seed=1)],
    [Recipe.of("rajni", gamma=0.1, min_tokens=4)],
    [Recipe.of("rajni", gamma=0.1, min_tokens=4, budget="image")],
    [Recipe.of("rajni", counts=[16, 8, 4, 2]),
     Recipe.of("rajni", counts=[16, 8, 4, 2], gamma=0.2, min_tokens=2)],
    [Recipe.of("rajni", counts=[16, 8, 4, 2], score="jacobian")],
    [Recipe.of("resize", size=24)],
]  # fmt: skip


def test_settings_that_make_the_same_candidate_share_a_key():
    keys = [{recipe.key(shape()) for recipe in recipes} for recipes in SAME]
    assert [len(found) for found in keys] == [1] * len(SAME)
    assert len(set.union(*keys)) == len(SAME)


def test_what_shares_a_key_shares_its_logits():
    model, batch = dense("class"), images(dense("class"))
    for recipes in SAME:
        built = [r.build(model, calibration=batch) for r in recipes]
        first, *others = (recorded(b, batch)[0] for b in built)
        for other in others:
            # the dense path has no mask where the identity of another method may have one
            torch.testing.assert_close(first, other, rtol=0, atol=1e-12)


def test_structure_and_tokens_together():
    model = dense("class")
    batch = images(model)
    recipe = Recipe.from_yaml(
        "{structure: {method: resize, size: 24}, tokens: {method: tome, r: 2}}"
    )
    both = recipe.build(model)
    _, trace = recorded(both, batch)
    assert [int(t[0]) - 1 for t in trace.tokens] == [7, 5, 3, 2]
    assert both.recipe == recipe
    small = Recipe.of("resize", size=24).build(model)
    shrunk = torch.nn.functional.interpolate(
        batch, size=(24, 24), mode="bicubic", antialias=True, align_corners=False
    )
    own = recorded(Recipe.of("tome", r=2).build(_resized(small)), shrunk)[0]
    torch.testing.assert_close(recorded(both, batch)[0], own, rtol=0, atol=1e-12)


def _resized(small):
    """A plain timm model with the resized one's weights."""
    plain = vit(img_size=24).double().eval()
    plain.load_state_dict(small.state_dict())
    return plain


def test_a_resize_of_an_oblong_image_keeps_its_aspect():
    model = dense("oblong")
    small = methods.prune(model, "resize", size=32)
    assert methods.model_shape(small).grid == (4, 2)
    assert recorded(small, images(model))[0].shape == (4, 7)


def test_calibration_is_written_into_the_recipe():
    model = dense("class")
    recipe = Recipe.of("rajni", gamma=1.0, min_tokens=2)
    batches = list(images(model, 7, seed=3).split(3))
    built = recipe.build(model, calibration=batches)
    assert len(built.recipe.tokens.params["counts"]) == 4
    assert recipe.tokens.params["counts"] is None
    # one tensor or batches of any size: the same images, the same counts
    assert recipe.build(model, calibration=torch.cat(batches)).recipe == built.recipe
    assert Recipe.from_yaml(built.recipe.to_yaml()) == built.recipe


def test_calibration_does_not_depend_on_dropout():
    model = dense("class")
    recipe, seen = Recipe.of("rajni", gamma=1.0, min_tokens=2), images(model, 6)
    quiet = recipe.build(model, calibration=seen)
    loud = copy.deepcopy(model).train()
    for module in loud.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    built = recipe.build(loud, calibration=seen)
    assert built.recipe == quiet.recipe
    assert built.training


@pytest.mark.parametrize("method", methods.names())
def test_presets_and_the_corners_of_the_space_are_valid_on_every_kind_of_model(method):
    declared = methods.get(method)
    for kind in MODELS:
        dims = shape(kind)
        for preset in declared.presets:
            assert declared.preset(preset, dims)
        for end in ("low", "high"):
            choices = {
                p.name: getattr(p, end) if hasattr(p, end) else p.choices[0] for p in declared.space
            }
            params = declared.resolve(choices, dims)
            try:
                params = declared.check(params, dims)
            except methods.BadInput as error:
                # a tiny model may run out of patches; anything else is a bug
                assert error.code == Code.EMPTY
                continue
            low, high = declared.bounds(params, dims)
            assert all(1 <= a <= b <= dims.patches for a, b in zip(low, high, strict=True))


def test_published_presets_are_the_papers_on_the_published_model():
    with torch.device("meta"):
        dims = methods.model_shape(timm.create_model("deit_small_patch16_224", pretrained=False))
    found = {
        m: [methods.get(m).preset(p, dims) for p in methods.get(m).presets] for m in methods.names()
    }
    assert [p["r"] for p in found["tome"]] == [8, 13, 16]
    assert [(p["keep_rate"], p["prune_layers"]) for p in found["topk"]] == [
        (0.75, (3, 6, 9)), (0.5, (3, 6, 9)),
    ]  # fmt: skip
    assert [(p["gamma"], p["min_tokens"], p["prune_layers"]) for p in found["rajni"]] == [
        (0.01, 16, None), (0.02, 16, None), (0.05, 16, None),
    ]  # fmt: skip
    assert [p["size"] for p in found["resize"]] == [192, 160]
