"""The search space: every draw is a recipe that the model allows and is inside the job's space."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import optuna
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.search.small import vit
from vitpareto import methods
from vitpareto.methods import BadInput, ModelShape, Recipe, recipe_of
from vitpareto.methods.engine.bad_input import Code
from vitpareto.methods.engine.parameters import Choice, Float, Int
from vitpareto.search.measure.closed_form import recipe_macs, schedule_macs
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space, resolve, snapped

METHODS = tuple(
    n for n in methods.names() if methods.get(n).training != "required" and n != "dense"
)
STAGED = ("topk", "random", "centre")


def _vit(**settings: Any) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(embed_dim=48, num_heads=3, num_classes=5, **settings)


@cache
def model(kind: str) -> nn.Module:
    """12x196: DeiT-S; 12x64; 3x16; 24x576: 18 rows of 32 patches. No weights."""
    if kind == "12x196":
        with torch.device("meta"):
            return timm.create_model("deit_small_patch16_224").eval()
    return {
        "12x64": lambda: _vit(img_size=64, patch_size=8, depth=12),
        "3x16": lambda: _vit(img_size=32, patch_size=8, depth=3),
        "24x576": lambda: _vit(img_size=(144, 256), patch_size=8, depth=24),
    }[kind]().eval()


SHAPES = ("12x196", "12x64", "3x16", "24x576")


@cache
def shape(kind: str, structure: str = "") -> ModelShape:
    """Return the shape of the model after a structural step given as YAML."""
    whole = methods.model_shape(model(kind))
    return Recipe.from_yaml(structure).reshape(whole, model(kind))[0]


@cache
def finder(kind: str) -> ShapeFinder:
    return ShapeFinder(model(kind))


def draws(space: Space, on: ShapeFinder, count: int) -> list[tuple[optuna.Trial, Recipe]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = [study.ask() for _ in range(count)]
    return [(trial, space.suggest(trial, on)) for trial in trials]


def suggested(params: dict[str, Any], on: ShapeFinder) -> tuple[dict[str, Any], Recipe]:
    """Return the Optuna parameters that the whole space uses of these, and the recipe."""
    trial = optuna.trial.FixedTrial(params)
    return trial.params, Space.of(METHODS, {}, {}).suggest(trial, on)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_every_draw_is_a_recipe_that_costs_no_more_than_dense(name: str, kind: str) -> None:
    declared, on = methods.get(name), shape(kind)
    dense = recipe_macs(Recipe(), on)[0]
    keys = set()
    for trial, recipe in draws(Space.of((name,), {}, {}), finder(kind), 200):
        names = {f"{name}.{p.name}" for p in declared.space}
        assert {"method"} < set(trial.params) <= names | {"method"}
        assert Recipe.from_dict(recipe.to_dict()).checked(on) == recipe.checked(on)
        after = shape(kind, Recipe(structure=recipe.structure).to_yaml())
        keys.add(recipe.key(after))
        low, high = recipe_macs(recipe, after)
        assert 0 < low <= high
        if recipe.tokens is None:
            assert high <= dense
            continue
        params = declared.check(recipe.tokens.params, on)
        for counts in declared.bounds(params, on):
            extra = declared.extra_macs(params, on, counts)
            assert 0 <= extra < 0.05 * dense
            assert schedule_macs(recipe, on, counts) - extra <= dense
    # the space has to resolve to more than a few recipes
    assert len(keys) >= {"12x196": 5, "12x64": 4, "3x16": 2, "24x576": 5}[kind]


@pytest.mark.parametrize("name", METHODS)
def test_draws_reach_the_whole_space(name: str) -> None:
    seen: dict[str, list[Any]] = {}
    for trial, _ in draws(Space.of((name,), {}, {}), finder("12x64"), 200):
        for key, value in trial.params.items():
            seen.setdefault(key, []).append(value)
    for p in methods.get(name).space:
        values = seen[f"{name}.{p.name}"]
        if isinstance(p, Choice):
            assert set(values) == set(p.choices)
        elif isinstance(p, Int):
            assert set(values) == set(range(p.low, p.high + 1))
        else:
            assert isinstance(p, Float)
            assert min(values) < p.low + 0.2 * (p.high - p.low)
            assert max(values) > p.high - 0.2 * (p.high - p.low)


@pytest.mark.parametrize("name", STAGED)
def test_spacing_is_suggested_only_with_several_stages(name: str) -> None:
    stages = set()
    for trial, recipe in draws(Space.of((name,), {}, {}), finder("12x196"), 60):
        stages.add(trial.params[f"{name}.stages"])
        single = trial.params[f"{name}.stages"] == 1
        assert (f"{name}.spacing" in trial.params) == (not single)
        assert recipe.tokens is not None
        if single:
            assert len(recipe.tokens.params["prune_layers"]) == 1
    assert stages == {1, 2, 3, 4}


def test_all_methods_are_proposed() -> None:
    drawn = draws(Space.of(METHODS, {}, {}), finder("12x64"), 200)
    assert {t.params["method"] for t, _ in drawn} == set(METHODS)
    assert all(recipe.method == t.params["method"] for t, recipe in drawn)


# --- presets


def presets(space: Space, on: ShapeFinder) -> dict[str, Recipe]:
    recipes = {}
    for label, params in space.preset_params():
        trial = optuna.trial.FixedTrial(params)
        recipes[label] = space.suggest(trial, on)  # type: ignore[arg-type]
        assert trial.params == params, "the suggested parameters are the enqueued ones"
    return recipes


def test_every_preset_is_inside_the_space_of_its_method() -> None:
    wanted = [f"{n} {p.name}" for n in METHODS for p in methods.get(n).presets]
    assert [label for label, _ in Space.of(METHODS, {}, {}).preset_params()] == wanted
    for kind in SHAPES:
        assert len(presets(Space.of(METHODS, {}, {}), finder(kind))) == len(wanted)


def test_presets_on_the_published_size_are_the_published_settings() -> None:
    on = shape("12x196")
    found = presets(Space.of(METHODS, {}, {}), finder("12x196"))
    for name in STAGED:
        for label, rate in (("75%", 0.75), ("50%", 0.5)):
            expected = Recipe.of(name, keep_rate=rate, prune_layers=(3, 6, 9))
            assert found[f"{name} {label}"].checked(on) == expected.checked(on)
    for gamma in (0.01, 0.02, 0.05):
        expected = Recipe.of("rajni", gamma=gamma, min_tokens=16)
        assert found[f"rajni gamma={gamma:g}"].checked(on) == expected.checked(on)
    for r in (8, 13, 16):
        assert found[f"tome r={r}"].checked(on) == Recipe.of("tome", r=r).checked(on)
    assert found["resize 86% side"] == Recipe.of("resize", size=192)
    assert found["resize 71% side"] == Recipe.of("resize", size=160)


def test_presets_scale_with_depth_and_patches() -> None:
    found = presets(Space.of(("topk", "tome"), {}, {}), finder("24x576"))
    topk, tome = found["topk 75%"].tokens, found["tome r=13"].tokens
    assert topk is not None and topk.params["prune_layers"] == (6, 12, 18)
    assert tome is not None and tome.params["r"] == round(13 / 196 * 576)


@pytest.mark.parametrize(
    ("space", "fixed", "remaining"),
    [
        ({}, {}, ["topk 75%", "topk 50%", "tome r=8", "tome r=13", "tome r=16"]),
        ({"topk.keep_rate": [0.6, 0.9]}, {}, ["topk 75%", "tome r=8", "tome r=13", "tome r=16"]),
        ({"topk.spacing": [0.3, 0.33]}, {}, ["tome r=8", "tome r=13", "tome r=16"]),
        ({}, {"topk.stages": 1, "tome.inflection": 0}, ["tome r=8", "tome r=13", "tome r=16"]),
        ({}, {"topk.stages": 3, "tome.inflection": 0.5}, ["topk 75%", "topk 50%"]),
    ],
)
def test_presets_outside_the_narrowed_space_are_omitted(
    space: dict[str, Any], fixed: dict[str, Any], remaining: list[str]
) -> None:
    narrowed = Space.of(("topk", "tome"), space, fixed)
    assert list(presets(narrowed, finder("12x196"))) == remaining
    for _, params in narrowed.preset_params():
        assert not set(fixed) & set(params), "a fixed parameter is not suggested"


# --- narrowing


def test_draws_are_inside_the_job_s_bounds_and_have_its_fixed_values() -> None:
    space = Space.of(
        ("topk", "rajni", "tome"),
        {"topk.keep_rate": [0.5, 0.9], "topk.stages": [2, 3], "rajni.score": ["jacobian"],
         "rajni.gamma": [0.01, 0.01]},
        {"tome.inflection": 0, "topk.spacing": 0.25},
    )  # fmt: skip
    seen = set()
    for trial, recipe in draws(space, finder("12x196"), 150):
        assert not {"tome.inflection", "topk.spacing"} & set(trial.params)
        assert recipe.tokens is not None
        params = recipe.tokens.params
        seen.add(recipe.method)
        if recipe.method == "topk":
            assert 0.5 <= params["keep_rate"] <= 0.9
            steps = params["prune_layers"]
            assert all(b - a == 3 for a, b in zip(steps, steps[1:], strict=False))
            assert trial.params["topk.stages"] in (2, 3)
        elif recipe.method == "rajni":
            assert (params["score"], params["gamma"]) == ("jacobian", 0.01)
        else:
            assert params["inflection"] == 0
    assert seen == {"topk", "rajni", "tome"}


def test_fixed_value_applies_only_if_its_condition_holds() -> None:
    """A single stage has no spacing, even if the job fixes one."""
    space = Space.of(("topk",), {}, {"topk.spacing": 0.25, "topk.stages": 1})
    for _, recipe in draws(space, finder("12x196"), 20):
        assert recipe.tokens is not None and len(recipe.tokens.params["prune_layers"]) == 1


def test_single_choice_needs_no_list() -> None:
    narrowed = Space.of(("rajni",), {"rajni.score": "jacobian"}, {}).parameters["rajni"]
    assert [p.choices for p in narrowed if isinstance(p, Choice)] == [("jacobian",)]


@pytest.mark.parametrize(
    ("names", "space", "fixed", "code", "hint"),
    [
        ((), {}, {}, Code.EMPTY, ""),
        (("tomee",), {}, {}, None, "'tome'"),
        (("tome",), {"tomee.inflection": [0, 1]}, {}, Code.UNKNOWN_NAME, "'tome'"),
        (("tome",), {"topk.keep_rate": [0.5, 0.9]}, {}, Code.UNKNOWN_NAME, ""),
        (("tome",), {}, {"tome.inflexion": 0}, Code.UNKNOWN_NAME, "'inflection'"),
        (("tome",), {"tome": [0, 1]}, {}, Code.UNKNOWN_NAME, ""),
        (("topk",), {"topk.keep_rate": [0.1, 0.9]}, {}, None, "0.2"),
        (("topk",), {"topk.keep_rate": [0.5, 1.5]}, {}, None, "1.5"),
        (("topk",), {"topk.keep_rate": [0.9, 0.5]}, {}, Code.OUT_OF_RANGE, "[0.9, 0.5]"),
        (("topk",), {"topk.keep_rate": 0.5}, {}, Code.WRONG_TYPE, "[low, high]"),
        (("topk",), {"topk.keep_rate": [0.5]}, {}, Code.WRONG_TYPE, "[low, high]"),
        (("topk",), {"topk.keep_rate": ["a", "b"]}, {}, None, "'a'"),
        (("topk",), {"topk.stages": [1, 2.5]}, {}, None, "2.5"),
        (("rajni",), {"rajni.score": ["jacobean"]}, {}, None, "'jacobian'"),
        (("rajni",), {"rajni.score": []}, {}, Code.OUT_OF_RANGE, "rajni.score"),
        (("topk",), {}, {"topk.keep_rate": 1.0}, None, "1.0"),
        (("topk",), {}, {"topk.stages": "3"}, None, "'3'"),
        (("topk",), {"topk.stages": [1, 2]}, {"topk.stages": 3}, None, "3"),
        (("topk",), {}, {"structure": "resize"}, Code.UNKNOWN_NAME, "'resize'"),
        (("topk", "resize"), {"structure": ["rezise"]}, {}, Code.UNKNOWN_NAME, "'resize'"),
        (("topk", "resize"), {"structure": []}, {}, Code.OUT_OF_RANGE, "none, resize"),
        (("topk", "resize"), {}, {"structure": ["none"]}, Code.UNKNOWN_NAME, "['none']"),
    ],
)
def test_bad_space_is_refused(
    names: tuple[str, ...],
    space: dict[str, Any],
    fixed: dict[str, Any],
    code: Code | None,
    hint: str,
) -> None:
    """`hint`: part of the message, the nearest name or the value. `code`: None if `methods`
    refuses the value.
    """
    with pytest.raises(BadInput) as caught:
        Space.of(names, space, fixed)
    assert code is None or caught.value.code == code
    assert hint in str(caught.value)


# --- structures under token methods


def test_token_methods_are_proposed_with_and_without_a_structure() -> None:
    space, on = Space.of(("topk", "resize"), {}, {}), finder("12x196")
    assert space.structures == ("none", "resize")
    by_structure: dict[str, list[Recipe]] = {"none": [], "resize": []}
    for trial, recipe in draws(space, on, 60):
        if trial.params["method"] == "resize":
            assert recipe.tokens is None and "structure" not in trial.params
            continue
        by_structure[trial.params["structure"]].append(recipe)
        assert ("resize.scale" in trial.params) == (recipe.structure is not None)
        # choices are relative to the patches that the structure leaves
        counts = recipe.tokens.declared.counts(recipe.tokens.params, on(recipe))  # type: ignore
        assert counts is not None and counts[0] <= on(recipe).patches
    assert min(map(len, by_structure.values())) > 5
    sizes = {on(r).patches for r in by_structure["resize"]}
    assert len(sizes) > 2 and max(sizes) < 196


def test_structure_is_not_suggested_if_there_is_only_one() -> None:
    for trial, recipe in draws(Space.of(("topk", "tome"), {}, {}), finder("12x64"), 20):
        assert "structure" not in trial.params and recipe.structure is None


def test_presets_have_no_structure_under_a_token_method() -> None:
    found = presets(Space.of(("topk", "resize"), {}, {}), finder("12x196"))
    assert list(found) == ["topk 75%", "topk 50%", "resize 86% side", "resize 71% side"]
    assert all(r.tokens is None or r.structure is None for r in found.values())
    resized = Space.of(("topk", "resize"), {}, {"structure": "resize"})
    assert list(presets(resized, finder("12x196"))) == ["resize 86% side", "resize 71% side"]


def test_job_narrows_the_structures() -> None:
    for space, fixed, remaining in (
        ({}, {"structure": "none"}, ("none",)),
        ({}, {"structure": "resize"}, ("resize",)),
        ({"structure": ["resize", "none"]}, {}, ("none", "resize")),
        ({"structure": "none"}, {}, ("none",)),
    ):
        narrowed = Space.of(("topk", "resize"), space, fixed)
        assert narrowed.structures == remaining
        for trial, recipe in draws(narrowed, finder("12x64"), 15):
            assert ("structure" in trial.params) == (recipe.method == "topk" and len(remaining) > 1)
            if recipe.method == "topk" and remaining == ("resize",):
                assert recipe.structure is not None


def test_methods_that_train_every_candidate_are_not_combined_with_token_methods() -> None:
    names = ("topk", "nvit", "revit", "patchmerger")
    assert Space.of(names, {}, {}).structures == ("none", "nvit")


# --- resolving


def test_relative_choices_become_absolute_settings() -> None:
    choices = {"keep_rate": 0.7, "first": 0.25, "stages": 2, "spacing": 0.25}
    assert resolve("topk", choices, shape("12x64")).tokens == (
        Recipe.of("topk", keep_rate=0.7, prune_layers=(3, 6)).checked(shape("12x64")).tokens
    )
    params = {"method": "topk", "structure": "none"}
    params |= {f"topk.{k}": v for k, v in choices.items()}
    used, recipe = suggested(params, finder("12x64"))
    assert used == params
    assert recipe == resolve("topk", choices, shape("12x64"))
    small = resolve("resize", {"scale": 0.5}, shape("24x576"))
    assert small.structure is not None and small.structure.params == {"size": 72}


def test_drawn_recipe_leaves_the_declared_counts() -> None:
    shape_of = ShapeFinder(vit())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ran = set()
    for _, recipe in draws(Space.of(METHODS, {}, {}), shape_of, 14):
        on = shape_of(recipe)
        built = recipe.build(vit(), calibration=images)
        with torch.inference_mode():
            logits, trace = built(images, trace=True)
        assert logits.shape == (2, 10) and logits.isfinite().all()
        step = recipe_of(built).tokens
        if step is not None:
            remaining = torch.stack(trace.tokens, dim=1) - on.prefix
            counts = step.declared.counts(step.params, on)
            low, high = step.declared.bounds(step.params, on)
            assert counts is None or counts == low == high
            assert (remaining >= torch.tensor(low)).all() and (
                remaining <= torch.tensor(high)
            ).all()
        ran.add(recipe.method)
    assert len(ran) >= 4


# --- schedules raised to the steps of a latency table


def eights(tokens: int) -> int:
    return -(-tokens // 8) * 8


@pytest.mark.parametrize("name", ["topk", "tome", "ppt", "random", "evit", "tram"])
def test_snapped_schedules_end_on_steps_and_keep_at_least_as_many_patches(name: str) -> None:
    space = replace(Space.of((name,), {}, {}), snap=eights)
    plain = Space.of((name,), {}, {})
    snapped_study, plain_study = (
        optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3)) for _ in range(2)
    )
    raised = 0
    for _ in range(40):
        on = shape("12x196")
        try:
            before_snap = plain.suggest(plain_study.ask(), finder("12x196"))
        except BadInput:
            snapped_study.ask()
            continue
        after_snap = space.suggest(snapped_study.ask(), finder("12x196"))
        assert before_snap.tokens is not None and after_snap.tokens is not None
        before = before_snap.tokens.declared.counts(before_snap.tokens.params, on)
        after = after_snap.tokens.declared.counts(after_snap.tokens.params, on)
        if after_snap == before_snap:
            continue
        raised += 1
        assert after_snap.tokens.params["counts"] == after
        assert all(b >= a for a, b in zip(before, after, strict=True))
        remaining = 196
        for count in after:
            assert count == remaining or (count + on.prefix) % 8 == 0
            remaining = count
        unchanged = set(before_snap.tokens.params) - {
            *before_snap.tokens.declared.schedule,
            "counts",
        }
        assert {k: after_snap.tokens.params[k] for k in unchanged} == {
            k: before_snap.tokens.params[k] for k in unchanged
        }
    uncounted = not any(p.name == "counts" for p in methods.get(name).parameters)
    assert (raised == 0) == uncounted


def test_snapped_recipe_leaves_its_counts() -> None:
    recipe = snapped(
        Recipe.of("topk", keep_rate=0.7, prune_layers=(3, 6, 9)), small_shape(), eights
    )
    assert recipe.tokens is not None
    assert recipe.tokens.params["counts"] == (64, 64, 64, 47, 47, 47, 31, 31, 31, 23, 23, 23)
    _, trace = recipe.build(vit())(torch.randn(2, 3, 64, 64), trace=True)
    assert [int(t[0]) - 1 for t in trace.tokens] == list(recipe.tokens.params["counts"])


def small_shape() -> ModelShape:
    return methods.model_shape(vit())
