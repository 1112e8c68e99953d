"""EViT: its rounding, its fused token against a slow one, and the schedules that it can have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.method_settings import recorded
from tests.methods.tiny_models import dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe
from vitpareto.methods.engine.tokens import Tokens
from vitpareto.methods.token.evit import keep_and_fuse, patches_kept


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shape() -> ModelShape:
    """16 patches, 4 blocks."""
    return methods.model_shape(dense("class"))


def counts(**params) -> tuple[int, ...]:
    declared = methods.get("evit")
    return declared.counts(declared.check(params, shape()), shape())


@pytest.mark.parametrize(
    "n, rate, kept",
    [(64, 0.7, 45), (10, 0.7, 7), (100, 0.55, 55), (3, 1 / 3, 1), (6, 5 / 6, 5), (10, 0.7001, 8),
     (196, 1.0, 196), (1, 0.2, 1), (9, 1e-9, 1), (196, 0.7, 138)],
)  # fmt: skip
def test_rounding_up_is_of_the_number_meant(n, rate, kept):
    assert patches_kept(n, rate) == kept


def test_every_exact_product_is_its_own_ceiling():
    """Rates as a search chooses them, in ten-thousandths."""
    for parts in range(1, 10_001, 7):
        for n in (1, 16, 49, 196, 256, 1369):
            assert patches_kept(n, parts / 10_000) == -(-parts * n // 10_000)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_fusing_is_the_papers(prefix):
    tokens = Tokens(
        draw(2, prefix + 6, 3), prefix, group=torch.tensor([[0, 1, 2, 3, 4, 5, -1]] * 2)
    )
    index = torch.tensor([[1, 4], [0, 5]])
    attention = draw(2, 6, seed=1).abs()
    fused = keep_and_fuse(tokens, index, attention)
    assert fused.patches == 3
    assert torch.equal(fused.x[:, :prefix], tokens.x[:, :prefix])
    for i, kept in enumerate(index.tolist()):
        patches = tokens.x[i, prefix:]
        others = sum(attention[i, j] * patches[j] for j in range(6) if j not in kept)
        expected = torch.stack([*patches[kept], others])
        torch.testing.assert_close(fused.x[i, prefix:], expected, rtol=0, atol=1e-14)
    assert fused.group.tolist() == [[2, 0, 2, 2, 1, 2, -1], [0, 2, 2, 2, 2, 1, -1]]
    assert fused.size is None


def test_the_counts_hold_the_fused_patch():
    assert counts(keep_rate=0.5, prune_layers=(1, 2)) == (16, 9, 6, 6)
    assert counts(keep_rate=0.5, prune_layers=(1, 2), fuse=False) == (16, 8, 4, 4)
    assert counts(counts=(16, 9, 6, 6)) == (16, 9, 6, 6)
    # never below a kept patch and the fused one, however long the schedule
    assert counts(keep_rate=0.1, prune_layers=(0, 1, 2, 3)) == (3, 2, 2, 2)
    assert counts(keep_rate=0.1, prune_layers=(0, 1, 2, 3), fuse=False) == (2, 1, 1, 1)


def test_a_rate_and_the_counts_it_means_are_one_candidate():
    by_rate = Recipe.of("evit", keep_rate=0.5, prune_layers=(1, 2))
    by_counts = Recipe.of("evit", counts=(16, 9, 6, 6))
    unfused = Recipe.of("evit", counts=(16, 9, 6, 6), fuse=False)
    assert by_rate.key(shape()) == by_counts.key(shape())
    assert by_rate.key(shape()) != unfused.key(shape())


def test_one_dropped_patch_is_fused_though_it_saves_no_token():
    """As published. The counts are the dense model's, and it is not the dense model."""
    params = {"keep_rate": 0.9375, "prune_layers": (1,)}
    model = dense("class")
    assert counts(**params) == (16,) * 4
    recipe = Recipe.of("evit", **params)
    assert recipe.key(shape()) != Recipe().key(shape())
    said, trace = recorded(recipe.build(model), images(model))
    plain, _ = recorded(methods.prune(model, "dense"), images(model))
    assert (said - plain).abs().max() > 1e-4
    for group in trace.group[1].tolist():
        assert sorted(group) == list(range(16))
        assert group != list(range(16)) or group[-1] == 15


def test_nothing_dropped_is_nothing_fused():
    """Few patches and a high rate: the ceiling is all of them."""
    recipe = Recipe.of("evit", keep_rate=0.95, prune_layers=(0, 1))
    model = dense("class")
    assert recipe.key(shape()) == Recipe().key(shape())
    said, _ = recorded(recipe.build(model), images(model))
    plain, _ = recorded(methods.prune(model, "dense"), images(model))
    assert torch.equal(said, plain)


@pytest.mark.parametrize(
    "params, code, details",
    [
        ({"counts": (16, 8, 1, 1)}, "out-of-range", {"name": "counts", "block": 2, "got": 1}),
        ({"counts": (8, 8)}, "mismatch", {"name": "counts", "got": 2, "expected": 4}),
        ({"keep_rate": 0.5, "prune_layers": (2, 4)}, "out-of-range", {"got": 4, "accepted": 3}),
        ({"keep_rate": 0.5, "fuse": "yes"}, "out-of-range", {"name": "fuse", "got": "yes"}),
        ({"keep_rate": 0}, "out-of-range", {"name": "keep_rate", "got": 0}),
        ({"keep_rate": 0.5, "counts": (16, 9, 6, 6)}, "conflict", {"name": "counts"}),
    ],
)
def test_impossible_settings_are_refused(params, code, details):
    with refused(code, where="evit", **details):
        methods.prune(dense("class"), "evit", **params)


def test_the_last_fused_patch_can_be_kept_and_fused_again():
    model = dense("avg")
    reduced = methods.prune(model, "evit", keep_rate=0.1, prune_layers=(0, 1, 2, 3))
    said, trace = recorded(reduced, images(model, 1))
    assert said.isfinite().all()
    assert [int(t) for t in trace.tokens] == [4, 2, 2, 2]
