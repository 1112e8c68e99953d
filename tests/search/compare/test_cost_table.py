"""Costs side by side: what a rate means for each method, and what is measured of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import BadInput, ModelShape, Recipe, UnsupportedModel
from vitpareto.methods.engine import method_registry
from vitpareto.methods.engine.method_declaration import Preset
from vitpareto.methods.engine.parameters import Float
from vitpareto.methods.engine.staged import StagedMethod
from vitpareto.search.compare.cost_table import CostRow, CostSettings, cost_rows
from vitpareto.search.compare.matched_settings import AT_MOST, GIVEN, KEPT, NEAREST, setting_at
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.measure.counting import counter, work
from vitpareto.search.models.loading import fresh_model

CLOSED = CostSettings(rounds=0)


def skeleton(name: str) -> tuple[ModelShape, nn.Module]:
    with torch.device("meta"):
        model = fresh_model(name)
    return methods.model_shape(model), model


SMALL = skeleton("vit_small_patch16_224")


def test_a_rate_is_kept_at_the_published_layers_where_a_method_has_one() -> None:
    """With the setting of the first preset otherwise: the published tables' rows come out."""
    plain = {
        method: setting_at(method, 0.75, *SMALL).recipe.to_dict()["tokens"]
        for method in ("topk", "patchmerger", "evit", "dynamicvit", "tnt")
    }
    layers = [3, 6, 9]
    assert plain == {
        "topk": {"method": "topk", "keep_rate": 0.75, "prune_layers": layers},
        "patchmerger": {
            "method": "patchmerger", "prune_layers": [2, 5, 8], "num_tokens": [147, 110, 82],
        },
        "evit": {"method": "evit", "keep_rate": 0.75, "prune_layers": layers, "fuse": True},
        "dynamicvit": {
            "method": "dynamicvit", "prune_layers": layers, "keep_rates": [0.75, 0.5625, 0.4219],
        },
        "tnt": {
            "method": "tnt", "prune_layers": [2], "keep_rates": [0.75], "similarity_prune": 25,
        },
    }  # fmt: skip
    assert setting_at("topk", 0.75, *SMALL).rule == KEPT


@pytest.mark.parametrize("method", ["tome", "resize", "ppt"])
@pytest.mark.parametrize("rate", [0.8, 0.7])
def test_without_a_rate_the_macs_come_as_near_to_topk_as_they_can(method: str, rate: float) -> None:
    """No setting of one step more or less is nearer."""
    shape, model = SMALL

    def macs(recipe: Recipe) -> int:
        return recipe_macs(recipe, recipe.reshape(shape, model)[0])[1]

    target = macs(Recipe.of("topk", keep_rate=rate).checked(shape))
    setting = setting_at(method, rate, *SMALL)
    assert setting.rule == NEAREST
    step, name, by = {
        "tome": (setting.recipe.tokens, "r", 1),
        "ppt": (setting.recipe.tokens, "r", 1),
        "resize": (setting.recipe.structure, "size", 16),
    }[method]
    assert step is not None
    missed = abs(macs(setting.recipe.checked(shape)) - target)
    for other in (step.params[name] - by, step.params[name] + by):
        params = {k: v for k, v in step.params.items() if v is not None}
        beside = Recipe.of(method, **{**params, name: other}).checked(shape)
        assert missed <= abs(macs(beside) - target)


def test_where_images_decide_a_schedule_is_given_or_the_most_is_compared() -> None:
    shape, _ = SMALL
    topk = methods.get("topk")
    counts = topk.counts(topk.check({"keep_rate": 0.5}, shape), shape)
    given = setting_at("rajni", 0.5, *SMALL)
    assert given.rule == GIVEN and given.recipe.tokens is not None
    assert given.recipe.tokens.params["counts"] == counts
    capped = setting_at("ats", 0.5, *SMALL)
    most = recipe_macs(capped.recipe.checked(shape), shape)[1]
    target = recipe_macs(Recipe.of("topk", keep_rate=0.5).checked(shape), shape)[1]
    assert capped.rule == AT_MOST and most == pytest.approx(target, rel=0.01)


def test_a_rate_so_low_that_topk_drops_its_last_stages() -> None:
    """On 64 patches 0.2³ leaves none: two stages, for TopK and what is compared with it."""
    digits = skeleton("digits")
    topk, tome, rajni = (setting_at(m, 0.2, *digits).recipe for m in ("topk", "tome", "rajni"))
    assert topk.tokens is not None and topk.tokens.params["prune_layers"] == (3, 6)
    assert rajni.tokens is not None and rajni.tokens.params["counts"][-1] == 2
    assert tome.tokens is not None and tome.tokens.params["r"] == 8  # the end of its space


def test_a_method_without_a_published_setting_has_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(methods.get("tome")), "presets", ())
    with refused("unsupported", method="tome"):
        setting_at("tome", 0.5, *SMALL)
    rows = list(cost_rows(["digits"], ["tome"], [0.5], CLOSED))
    assert "'tome'" in rows[1].note and rows[1].gmacs is None


def test_a_new_method_needs_nothing_but_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that this table never heard of, whose only choice is a number of its own."""

    class Odd(StagedMethod):
        name = "odd"
        space = (Float("first", low=0, high=1), Float("dropped", low=0.05, high=0.9))
        presets = (Preset("published", {"first": 0.25, "dropped": 0.3}),)

        def resolve(self, choices, shape):
            return {"keep_rate": 1 - choices["dropped"], "prune_layers": (3, 6, 9)}

    monkeypatch.setitem(method_registry._REGISTRY, "odd", Odd())
    setting = setting_at("odd", 0.75, *SMALL)
    assert setting.rule == NEAREST and setting.recipe.tokens is not None
    assert setting.recipe.tokens.params["keep_rate"] == pytest.approx(0.75, abs=0.005)


# --- rows


@pytest.fixture(scope="module")
def measured() -> list[CostRow]:
    said: list[str] = []
    bench = CostSettings(batch=2, rounds=6, check=True, log=said.append)
    rows = list(
        cost_rows(["digits"], ["dense", "tram", "patchmerger", "resize", "ats"], [0.5], bench)
    )
    assert len(said) == 5 and said[0] == "digits: dense"
    return rows


def test_every_figure_of_a_row(measured: list[CostRow]) -> None:
    assert [r.method for r in measured] == ["dense", "tram", "patchmerger", "resize", "ats"]
    dense = measured[0]
    assert dense.share == 1 and dense.rate is None and dense.recipe == "dense"
    for row in measured[:-1]:
        assert row.gmacs == row.gmacs_low == row.gmacs_high
        assert row.fvcore_gmacs == pytest.approx(row.gmacs, rel=1e-3)
        assert row.share == pytest.approx(row.gmacs / dense.gmacs)
        assert row.speedup_low <= row.speedup <= row.speedup_high
        assert row.images_per_s > 0 and row.peak_mb > 4 * row.params_m
        assert row.target.batch == 2 and row.target.device == "cpu" and not row.note
    for row in measured[1:-1]:
        assert row.rate == 0.5 and row.share < 0.6
        assert row.images_per_s == pytest.approx(dense.images_per_s * row.speedup)
    assert measured[2].params_m > dense.params_m, "PatchMerger's queries are parameters"


def test_what_images_decide_has_bounds_and_no_number(measured: list[CostRow]) -> None:
    ats = measured[-1]
    assert ats.gmacs is None and ats.images_per_s is None and ats.peak_mb is None
    assert 0 < ats.gmacs_low < ats.gmacs_high and ats.note == "images decide"


def test_closed_forms_alone_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a forward was run")

    monkeypatch.setattr(nn.Module, "__call__", never)
    rows = list(cost_rows(["vit_small_patch16_224"], ["tram", "evit"], [0.75, 0.7], CLOSED))
    assert [round(r.gmacs, 3) for r in rows] == [4.608, 3.202, 2.976, 3.235, 3.036]
    assert all(
        r.images_per_s is None and r.params_m == pytest.approx(22.05, abs=0.01) for r in rows
    )
    assert [f.gflops for f in rows[1].published] == [2.9964]
    assert rows[1].published[0].ours == pytest.approx(2.9968, abs=1e-4)
    assert rows[2].published == ()


def test_a_published_figure_of_another_model_names_the_difference() -> None:
    """TRAM's PatchMerger has no class token; the row's own model has one, and costs more."""
    names = ["patchmerger", "topk"]
    _, merger, topk = cost_rows(["vit_small_patch16_224"], names, [0.75], CLOSED)
    (other,), (same,) = merger.published, topk.published
    assert other.differs == "class_token=False, global_pool=avg"
    assert "no class token" in other.remark and (same.differs, same.remark) == ("", "")
    shape, model = SMALL
    recipe = Recipe.of("patchmerger", prune_layers=[2, 5, 8], num_tokens=[147, 110, 82])
    with_token = counter("thop").count(work(recipe.checked(shape), model)) / 1e9
    assert other.ours == pytest.approx(other.gflops, rel=1e-3)
    assert with_token > 1.005 * other.gflops, "set beside it unsaid, it would mislead"


@pytest.mark.parametrize(
    ("models", "names", "rates", "bench", "code"),
    [
        (["digit"], ["topk"], [0.5], CLOSED, "unknown-name"),
        (["digits"], ["topkk"], [0.5], CLOSED, "unknown-name"),
        (["digits"], ["topk"], [1.0], CLOSED, "out-of-range"),
        (["digits"], ["topk"], [0.5], CostSettings(batch=0), "out-of-range"),
        (["digits"], ["topk"], [0.5], CostSettings(rounds=-1), "out-of-range"),
        (["digits"], ["topk"], [0.5], CostSettings(dtype="int8"), "unknown-name"),
        (["digits"], ["topk"], [], CLOSED, "missing"),
        (["vit_small_patch16_224.nosuch"], ["topk"], [0.5], CLOSED, None),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    models: list[str], names: list[str], rates: list[float], bench: CostSettings, code: str | None
) -> None:
    with pytest.raises(BadInput) as caught:
        next(cost_rows(["vit_tiny_patch16_224", *models], names, rates, bench))
    assert code is None or caught.value.code == code


def test_an_unsupported_model_is_refused_before_the_others_are_measured() -> None:
    with pytest.raises(UnsupportedModel):
        next(cost_rows(["digits", "resnet18"], ["topk"], [0.5], CLOSED))
