"""Every method in float32, half precision and under autocast."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.methods.decisions import Decisions
from tests.methods.method_settings import CASES, COVERING, PAIRS, Case, pairs, pruned, recorded
from tests.methods.tiny_models import dense, images, vit
from vitpareto import methods
from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.merging import bipartite_match, merge_matched
from vitpareto.methods.engine.tokens import Tokens
from vitpareto.methods.token.ppt import merge_or_keep

some_pairs = pairs(PAIRS, fast=COVERING)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@some_pairs
def test_fused_and_plain_attention_agree(kind, case: Case):
    fused, batch = copy.deepcopy(pruned(kind, case)).float(), images(dense(kind)).float()
    expected, _ = recorded(fused, batch)
    for module in fused.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    said, _ = recorded(fused, batch)
    # float32 through four blocks of peaked attention
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-4)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def off(said: Tensor, exact: Tensor) -> float:
    """Root mean square difference, as a share of the exact logits'."""
    return float((said.double() - exact).norm() / exact.norm())


@cache
def rounding(kind: str) -> float:
    """What bfloat16 costs the dense model."""
    half, batch = copy.deepcopy(dense(kind)).bfloat16(), images(dense(kind), 8).bfloat16()
    exact = copy.deepcopy(half).double()
    with torch.no_grad():
        return off(half(batch), exact(batch.double()))


@some_pairs
def test_bfloat16_agrees_where_it_chooses_the_same(kind, case: Case, record_property):
    """The choices of float64 imposed on bfloat16 (same weights, same images): what is left is
    rounding, at most a few times the dense model's. How many images bfloat16 left alone would
    choose otherwise for is told, not judged.
    """
    half, batch = copy.deepcopy(pruned(kind, case)).bfloat16(), images(dense(kind), 8).bfloat16()
    wide = copy.deepcopy(half).double()
    with Decisions() as exactly:
        exact, wanted = recorded(wide, batch.double())
    with Decisions(exactly) as imposed:
        said, forced = recorded(half, batch)
    assert len(imposed.made) == len(exactly.made)
    assert all(torch.equal(a, b) for a, b in zip(forced.group, wanted.group, strict=True))
    assert said.dtype is torch.bfloat16
    # 2.9 times at most where this was written; a free choice is off by up to 78 times
    assert off(said, exact) < 4 * rounding(kind)

    _, free = recorded(half, batch)
    differ = torch.zeros(len(batch), dtype=torch.bool)
    for a, b in zip(free.group, wanted.group, strict=True):
        differ |= (a != b).any(dim=1)
    record_property("images whose selections differ in bfloat16", f"{differ.float().mean():.3f}")


@pytest.mark.parametrize("method", [m for m in methods.names("tokens") if m != "dense"])
def test_choices_are_found(method):
    """A method whose choices nobody recorded would be compared on luck; the centre is fixed."""
    case = next(c for c in CASES if c.method == method)
    built = pruned("class", case)
    with Decisions() as made:
        recorded(built, images(dense("class")))
    assert (len(made.made) == 0) == (method == "centre")


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs_and_keeps_the_counts(case: Case, dtype):
    reduced, batch = copy.deepcopy(pruned("registers", case)), images(dense("registers"), 2)
    _, exact = recorded(reduced, batch)
    half, trace = recorded(reduced.to(dtype), batch.to(dtype))
    assert half.dtype is dtype
    assert half.isfinite().all()
    if not case.per_image:
        assert all(torch.equal(a, b) for a, b in zip(trace.tokens, exact.tokens, strict=True))


@every_case
def test_autocast_runs(case: Case):
    reduced, batch = case.build(dense("avg", torch.float32)), images(dense("avg", torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        said, _ = recorded(reduced, batch)
    assert said.isfinite().all()


@pytest.mark.parametrize("method", ["tome", "ppt"])
def test_merging_stays_within_half_precisions_range(method):
    """A sum of three patches would leave float16's range (65,504), their mean does not."""
    x = torch.full((1, 9, 4), 30000.0, dtype=torch.float16)
    size = torch.full((1, 8), 3.0)
    tokens = Tokens(x, 1, size=size)
    metric = draw(1, 9, 4)
    match = bipartite_match(metric, 1, 3)
    if method == "tome":
        merged = merge_matched(tokens, match)
    else:
        kept = torch.arange(5)[None]
        merged = merge_or_keep(tokens, match, kept, torch.tensor([True]))
    assert merged.x.dtype is torch.float16
    torch.testing.assert_close(merged.x, torch.full_like(merged.x, 30000.0), rtol=2e-3, atol=0)
    assert merged.size.sum() == 24


def test_sizes_are_counted_exactly_in_bfloat16():
    """256 + 1 is 256 in bfloat16: sizes are kept in float32."""
    tokens = Tokens(torch.ones(1, 2, 4, dtype=torch.bfloat16), 0, size=torch.tensor([[1.0, 256.0]]))
    merged = merge_matched(tokens, bipartite_match(draw(1, 2, 4), 0, 1))
    assert merged.size.tolist() == [[257.0]]
    unmerged = Tokens(torch.ones(1, 600, 4, dtype=torch.bfloat16), 0)
    assert unmerged.sizes().dtype is torch.float32
    halves = merge_matched(unmerged, bipartite_match(draw(1, 600, 4), 0, 300))
    assert halves.size.sum() == 600
    assert halves.size.dtype is torch.float32


@pytest.mark.parametrize("method", ["tome", "ppt", "ats"])
def test_pooling_stays_within_half_precisions_range(method):
    """Sizes times a large channel, summed over all patches, would leave float16's range."""
    case = next(c for c in CASES if c.method == method)
    half = case.build(vit(global_pool="avg", fc_norm=False).eval()).half()
    # what the pooling sees is the same token in every patch, with channels up to 20,000
    with torch.no_grad():
        half.norm.weight.zero_()
        half.norm.bias.copy_(torch.linspace(0, 20000, len(half.norm.bias)))
        half.head.weight.mul_(1e-4)
        said = half(images(half, 3).half())
        expected = half.head(half.norm.bias.expand(3, -1))
    torch.testing.assert_close(said, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("padded", [False, True])
def test_mean_over_many_queries_in_half_precision(padded):
    q, k, v = (torch.randn(2, 2, 1024, 8, generator=torch.Generator().manual_seed(s)).double()
               for s in range(3))  # fmt: skip
    valid = None
    if padded:
        valid = torch.arange(1024).expand(2, -1) < torch.tensor([[700], [1024]])

    def mean(dtype):
        parts = (t.half().to(dtype) for t in (q, k, v))
        seen = Attended(*parts, 8**-0.5, None, 0, False, valid)
        return seen.patch_rows()[0].double()

    exact, said = mean(torch.float64), mean(torch.float16)
    # one rounding of the result, and those of each softmax
    assert ((said - exact).abs() / exact).mean() < 3e-4
    torch.testing.assert_close(said.sum(dim=-1), exact.sum(dim=-1), rtol=5e-4, atol=0)
