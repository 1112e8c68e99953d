"""PPT: its choice between merging and dropping, what it costs, what it refuses."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.method_settings import CASES, pruned, recorded
from tests.methods.tiny_models import MODELS, dense, images
from tests.methods.token.test_ats import first_share
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.methods.engine.merging import bipartite_match, merge_matched
from vitpareto.methods.engine.tokens import Tokens, keep
from vitpareto.methods.token.ppt import merge_or_keep
from vitpareto.search.measure.closed_form import recipe_macs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n, r", [(2, 1), (7, 3), (12, 4)])
def test_each_image_is_merged_or_dropped_as_if_alone(prefix, n, r):
    sizes = torch.randint(1, 5, (4, n), generator=torch.Generator().manual_seed(3)).double()
    # two of n + 2 original patches are gone already
    group = torch.cat([torch.full((4, 2), -1), torch.arange(n).repeat(4, 1)], dim=1)
    state = {"state": draw(4, n, 2, seed=2)}
    tokens = Tokens(draw(4, prefix + n, 5), prefix, size=sizes, group=group, per_patch=state)
    match = bipartite_match(draw(4, prefix + n, 3, seed=1), prefix, r)
    kept = draw(4, n, seed=4).argsort(dim=1)[:, : n - r]
    pooled = torch.tensor([True, False, False, True])
    out = merge_or_keep(tokens, match, kept, pooled)
    merged, dropped = merge_matched(tokens, match), keep(tokens, kept)
    for image, from_pool in enumerate(pooled):
        one = merged if from_pool else dropped
        torch.testing.assert_close(out.x[image], one.x[image], rtol=0, atol=1e-13)
        assert torch.equal(out.size[image], one.size[image])
        assert torch.equal(out.group[image], one.group[image])
        if not from_pool:
            assert torch.equal(out.x[image], one.x[image])
    assert torch.equal(out.x[:, :prefix], tokens.x[:, :prefix])
    assert out.per_patch["state"].shape == (4, n - r, 2)


def test_the_variance_of_significance_decides():
    model = dense("class")
    batch = images(model)
    expected = first_share(model, batch).var(dim=1)
    middle = float(expected.median())
    reduced = methods.prune(model, "ppt", r=3, prune_layers=[0], threshold=middle)
    _, trace = recorded(reduced, batch)
    torch.testing.assert_close(trace.figures[0]["variance"], expected)
    assert torch.equal(trace.figures[0]["pooled"].bool(), expected < middle)
    # what is merged loses no patch, what is dropped loses r
    lost = (trace.group[0] < 0).sum(dim=1)
    assert torch.equal(lost, torch.where(expected < middle, 0, 3))


def test_the_mixed_setting_mixes():
    case = next(c for c in CASES if str(c) == "ppt-mixed")
    found = []
    for kind in MODELS:
        _, trace = recorded(pruned(kind, case), images(dense(kind)))
        found += [0 < float(f["pooled"].mean()) < 1 for f in trace.figures if f]
    assert sum(found) > len(found) / 2


def deit() -> methods.ModelShape:
    with torch.device("meta"):
        return methods.model_shape(timm.create_model("deit_small_patch16_224", pretrained=False))


def test_presets_are_the_published_ones_on_the_published_model():
    shape, ppt = deit(), methods.get("ppt")
    found = [ppt.preset(p, shape) for p in ppt.presets]
    published = {"r": 50, "prune_layers": (3, 6, 9)}
    assert [{k: v for k, v in p.items() if v is not None} for p in found] == [
        {**published, "threshold": 7e-5},
        {**published, "threshold": 6e-5},
    ]
    assert ppt.check({"r": 50}, shape) == found[0]
    # a matching merges at most half of 96
    assert ppt.counts(found[0], shape) == (196,) * 3 + (146,) * 3 + (96,) * 3 + (48,) * 3


def test_it_costs_what_its_readme_says():
    """2.944411999 G: at block 9 half of 96 patches go, not 50, which would be 0.2 % less."""
    shape = deit()
    low, high = recipe_macs(Recipe.of("ppt", r=50), shape)
    assert low == high
    # theirs counts a normalised element once, not five times; what is left is 0.03 %: their means
    normed = sum(n + m + 2 * shape.prefix for n, m in [(196, 196)] * 3 + [(146, 146)] * 2)
    normed += sum(n + m + 2 * shape.prefix for n, m in [(196, 146), (146, 96), (96, 48)])
    normed += sum(n + m + 2 * shape.prefix for n, m in [(96, 96)] * 2 + [(48, 48)] * 2)
    theirs = low - 4 * shape.dim * (normed + 49)
    assert theirs / 1e9 == pytest.approx(2.944411999, rel=5e-4)


def test_the_default_threshold_goes_with_the_patches():
    shape, ppt = methods.model_shape(dense("class")), methods.get("ppt")
    assert ppt.check({"r": 2}, shape)["threshold"] == pytest.approx(
        7e-5 * (196 / 16) ** 2, rel=1e-3
    )
    from_counts = ppt.check({"counts": [14, 12, 12, 12]}, shape)
    assert from_counts["threshold"] == ppt.check({"r": 2}, shape)["threshold"]
    by_r = Recipe.of("ppt", r=2, prune_layers=[0, 1])
    assert by_r.key(shape) == Recipe.of("ppt", **from_counts).key(shape)
    assert by_r.key(shape) != Recipe.of("ppt", r=2, prune_layers=[0, 1], threshold=1).key(shape)


@pytest.mark.parametrize(
    "kind",
    ["class", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("avg", "distilled"))],
)
def test_the_exported_program_has_the_same_logits(kind):
    model = dense(kind)
    case = next(c for c in CASES if str(c) == "ppt-mixed")
    reduced = pruned(kind, case)
    with torch.no_grad():
        program = torch.export.export(
            reduced, (images(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ).module()
        for count in (1, 2, 5):
            batch = images(model, count, seed=count)
            torch.testing.assert_close(program(batch), reduced(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "params, code, details",
    [
        ({}, "missing", {"name": "r"}),
        ({"r": -1}, "out-of-range", {"name": "r", "got": -1}),
        ({"r": 2, "prune_layers": [4]}, "out-of-range", {"name": "prune_layers", "got": 4}),
        ({"r": 2, "threshold": -1}, "out-of-range", {"name": "threshold", "got": -1}),
        ({"r": 2, "threshold": float("nan")}, "wrong-type", {"name": "threshold"}),
        ({"r": 2, "counts": [9] * 4}, "conflict", {"name": "counts"}),
        ({"counts": [9] * 4, "prune_layers": [1]}, "conflict", {"name": "counts"}),
        ({"counts": [7] * 4}, "out-of-range", {"block": 0, "got": 9, "accepted": 8}),
        ({"counts": [9] * 3}, "mismatch", {"name": "counts", "got": 3, "expected": 4}),
    ],
)
def test_impossible_settings_are_refused(params, code, details):
    with refused(code, where="ppt", **details):
        methods.prune(dense("class"), "ppt", **params)
