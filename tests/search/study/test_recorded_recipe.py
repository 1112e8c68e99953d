"""The record of a recipe: equal to `Recipe.to_dict` on disk, and readable without its methods."""

from __future__ import annotations

import json

import pytest

from tests.refusals import refused
from vitpareto.methods import Recipe
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep

RECIPES = (
    Recipe(),
    Recipe.of("tome", r=13),
    Recipe.of("topk", keep_rate=0.5, prune_layers=[3, 6]),
    Recipe.of("resize", size=160),
    Recipe.from_yaml(
        "structure: {method: nvit, target: 0.65}\ntokens: {method: topk, keep_rate: 0.5}\n"
        "weights: 375b9947fb6b3176"
    ),
)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_record_is_the_recipe_on_disk(recipe: Recipe) -> None:
    recorded = RecordedRecipe.of(recipe)
    assert json.dumps(recorded.to_json()) == json.dumps(recipe.to_dict())
    assert RecordedRecipe.from_json(json.loads(json.dumps(recipe.to_dict()))) == recorded
    assert recorded.to_recipe() == recipe and str(recorded) == str(recipe)


def test_methods_are_named_the_structural_one_first() -> None:
    assert [RecordedRecipe.of(r).method for r in RECIPES] == [
        "dense", "tome", "topk", "resize", "nvit+topk",
    ]  # fmt: skip
    assert [RecordedRecipe.of(r).only_controls for r in RECIPES] == [
        True, False, False, True, False,
    ]  # fmt: skip


def test_a_method_of_another_version_is_read_and_written_but_not_built() -> None:
    stored = {"tokens": {"method": "later", "rate": 0.5}, "weights": "375b9947fb6b3176"}
    recorded = RecordedRecipe.from_json(stored)
    assert recorded.tokens == RecordedStep("later", {"rate": 0.5})
    assert recorded.to_json() == stored
    assert str(recorded) == "later" and not recorded.only_controls
    with refused("unknown-name", name="later"):
        recorded.to_recipe()


def test_an_unknown_part_is_not_dropped() -> None:
    with pytest.raises(TypeError, match="frobnicate"):
        RecordedRecipe.from_json({"frobnicate": {"method": "tome"}})
