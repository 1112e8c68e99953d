"""ATS: its sampling against one written from the paper's words, its cap, its exported programs."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from tests.methods.method_settings import recorded
from tests.methods.tiny_models import dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Recipe
from vitpareto.methods.engine.tokens import Tokens, keep_chosen, rising
from vitpareto.methods.token.ats import sample


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def picks(share: Tensor, targets: int) -> set[int]:
    """The patches of one image that are picked, share [n]: every target looks at every patch."""
    order = sorted(range(len(share)), key=lambda j: (float(share[j]), j))
    cdf = share[order].cumsum(0)
    cdf = (cdf - cdf.min()) / (cdf.max() - cdf.min())
    start = float(cdf[cdf > 0].min())
    wanted = torch.linspace(start, 1, targets, dtype=cdf.dtype)
    return {order[int((cdf - y).abs().argmin())] for y in wanted}


def sampled(share: Tensor, valid: Tensor | None, targets: int) -> list[set[int]]:
    picked, order = sample(share, valid, targets)
    assert torch.equal(order.sort(dim=1).values, torch.arange(share.shape[1]).expand_as(order))
    return [set(o[p].tolist()) for o, p in zip(order, picked, strict=True)]


@pytest.mark.parametrize("peaked", [0.3, 1, 4, 12])
@pytest.mark.parametrize("n, targets", [(2, 2), (3, 9), (16, 16), (16, 64), (60, 16), (196, 196)])
def test_each_target_picks_the_nearest(n, targets, peaked):
    share = draw(20, n, seed=n) ** peaked
    share = share / share.sum(dim=1, keepdim=True)
    assert sampled(share, None, targets) == [picks(row, targets) for row in share]


@pytest.mark.parametrize("peaked", [0.3, 4])
def test_padding_is_never_picked_and_changes_nothing(peaked):
    share, left = draw(12, 16, seed=1) ** peaked, torch.arange(12) + 2
    valid = torch.arange(16)[None, :] < left[:, None]
    share = share.masked_fill(~valid, 0.0)
    found = sampled(share, valid, 16)
    for row, n, own in zip(share, left.tolist(), found, strict=True):
        assert own == picks(row[:n], 16)


def test_equal_shares_rank_by_position_wherever_the_padding_is():
    share = torch.tensor([[2.0, 1, 2, 0, 1, 2, 0, 1]])
    values, order = rising(share)
    assert order.tolist() == [[3, 6, 1, 4, 7, 0, 2, 5]]
    assert values.tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    padded = torch.cat([share, torch.zeros(1, 3)], dim=1)
    valid = torch.arange(11)[None, :] < 8
    assert sample(padded, valid, 8)[1][:, :8].tolist() == order.tolist()
    assert sampled(padded, valid, 8) == sampled(share, None, 8)


@pytest.mark.parametrize("share", [[0.0, 0, 0], [0.0, 0, 1], [0.0, 1, 0], [1e-300, 0, 0]])
def test_where_one_patch_has_everything_it_stays(share):
    (found,) = sampled(torch.tensor([share], dtype=torch.float64), None, 3)
    assert len(found) == 1
    if max(share) == 1:
        assert found == {share.index(1)}


def test_one_patch_stays():
    assert sampled(torch.tensor([[1.0]]), None, 16) == [{0}]
    valid = torch.tensor([[True, False]])
    assert sampled(torch.tensor([[1.0, 0.0]]), valid, 16) == [{0}]


def test_an_image_of_nan_stays_one_and_its_neighbours_are_well():
    model = dense("avg")
    pruned, batch = methods.prune(model, "ats", prune_layers=[0, 1]), images(model)
    expected, _ = recorded(pruned, batch)
    broken = torch.cat([batch[:2], torch.full_like(batch[:1], float("nan")), batch[3:]])
    said, _ = recorded(pruned, broken)
    assert said.isnan().all(dim=1).tolist() == [False, False, True, False]
    torch.testing.assert_close(said[[0, 1, 3]], expected[[0, 1, 3]], rtol=0, atol=1e-10)
    alone, _ = recorded(pruned, broken[2:3])
    assert alone.isnan().all()


def test_chosen_patches_stay_in_order_and_padding_is_marked():
    x = draw(2, 6, 3)
    tokens = Tokens(x, 1, group=torch.arange(5).repeat(2, 1))
    chosen = torch.tensor([[True, False, True, True, False], [False, False, False, False, True]])
    out = keep_chosen(tokens, chosen, 3)
    assert torch.equal(out.x[0], x[0, [0, 1, 3, 4]])
    assert torch.equal(out.x[1, :2], x[1, [0, 5]])
    assert out.valid is not None and out.group is not None
    assert out.valid.tolist() == [[True] * 3, [True, False, False]]
    assert out.group.tolist() == [[0, -1, 1, 2, -1], [-1, -1, -1, -1, 0]]


def test_of_more_picks_than_the_cap_the_most_significant_stay():
    model = dense("class")
    batch = images(model)
    _, free = recorded(methods.prune(model, "ats", prune_layers=[0]), batch)
    picked = free.figures[0]["picked"]
    assert torch.equal(picked, free.figures[0]["kept"])
    assert torch.equal(picked, free.tokens[0] - 1)
    # caps one after the other take the patches away one by one, so that they nest
    before = free.group[0] >= 0
    for cap in range(int(picked.max()) - 1, 0, -1):
        capped = methods.prune(model, "ats", prune_layers=[0], max_tokens=cap)
        _, trace = recorded(capped, batch)
        assert torch.equal(trace.figures[0]["picked"], picked)
        assert torch.equal(trace.tokens[0] - 1, picked.clamp(max=cap))
        left = trace.group[0] >= 0
        assert not (left & ~before).any()
        before = left
    # the last one is the most significant
    assert torch.equal(before.int().argmax(dim=1), first_share(model, batch).argmax(dim=1))


def first_share(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Significance in block 0 of the dense model, [B, n], from timm's own parts."""
    block = model.blocks[0]
    with torch.no_grad():
        x = block.norm1(model.norm_pre(model._pos_embed(model.patch_embed(batch))))
        qkv = block.attn.qkv(x).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * block.attn.scale).softmax(dim=-1)
        share = weights[:, :, 0, 1:].sum(dim=1) * qkv[2].transpose(1, 2).flatten(2)[:, 1:].norm(
            dim=-1
        )
    return share / share.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("params", [{}, {"max_tokens": 6}], ids=["free", "capped"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) for kind in ("class", "avg", "map")]
    + ["registers"],
)
def test_the_exported_program_is_padded_to_its_bound_with_the_same_logits(kind, params):
    model = dense(kind)
    pruned = methods.prune(model, "ats", prune_layers=[0, 1, 2], **params)
    with torch.no_grad():
        program = torch.export.export(
            pruned, (images(model, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        ).module()
        for count in (1, 2, 5):
            batch = images(model, count, seed=count)
            torch.testing.assert_close(program(batch), pruned(batch), rtol=0, atol=1e-12)


def test_only_image_budget_rajni_refuses_export():
    shape = methods.model_shape(dense("class"))
    assert (
        methods.get("ats").refuses_export({"prune_layers": (0,), "max_tokens": None}, shape) == ""
    )
    rajni = methods.get("rajni")
    params = {"gamma": 1.0, "min_tokens": 2}
    by_image = rajni.check({**params, "budget": "image"}, shape)
    assert "budget=calibrated" in rajni.refuses_export(by_image, shape)
    assert rajni.refuses_export({**by_image, "gamma": 0.0}, shape) == ""
    calibrated = rajni.check({**params, "counts": [16, 9, 9, 9]}, shape)
    assert rajni.refuses_export(calibrated, shape) == ""


def test_default_and_preset_are_the_published_ones_on_the_published_model():
    with torch.device("meta"):
        shape = methods.model_shape(timm.create_model("deit_small_patch16_224", pretrained=False))
    ats = methods.get("ats")
    published = {"prune_layers": tuple(range(3, 12)), "max_tokens": None}
    assert ats.check({}, shape) == published
    assert [ats.preset(p, shape) for p in ats.presets] == [published]
    low, high = ats.bounds(published, shape)
    assert low == (196,) * 3 + (1,) * 9 and high == (196,) * 12
    assert ats.counts(published, shape) is None
    assert ats.counts(ats.check({"prune_layers": []}, shape), shape) == (196,) * 12


def test_caps_that_never_bind_make_the_same_candidate():
    shape = methods.model_shape(dense("class"))

    def key(**params):
        return Recipe.of("ats", prune_layers=[0, 2], **params).key(shape)

    assert key() == key(max_tokens=16) == key(max_tokens=[99, 16])
    assert key(max_tokens=5) == key(max_tokens=[5, 9]) != key(max_tokens=[5, 4])
    assert methods.get("ats").bounds({"prune_layers": (0, 2), "max_tokens": (5, 9)}, shape) == (
        (1, 1, 1, 1),
        (5, 5, 5, 5),
    )


@pytest.mark.parametrize(
    "params, code, details",
    [
        ({"prune_layers": [4]}, "out-of-range", {"name": "prune_layers", "got": 4, "accepted": 3}),
        ({"prune_layers": 1}, "wrong-type", {"name": "prune_layers", "got": 1}),
        ({"max_tokens": 0}, "out-of-range", {"name": "max_tokens", "got": 0}),
        ({"prune_layers": [0, 1], "max_tokens": [3]}, "mismatch", {"got": 1, "expected": 2}),
        ({"counts": [9] * 4}, "unknown-name", {"name": "counts"}),
    ],
)
def test_impossible_settings_are_refused(params, code, details):
    with refused(code, where="ats", **details):
        methods.prune(dense("class"), "ats", **params)
