"""TRAM against its formulas written out slowly, and the head-by-head attention it reads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.method_settings import recorded
from tests.methods.tiny_models import dense, images
from vitpareto import methods
from vitpareto.methods.engine import head_maximum
from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.head_maximum import attend_with_head_maximum
from vitpareto.methods.engine.tokens import Tokens
from vitpareto.methods.token.tram import TramReduction, second_order_degree


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [128, 3, 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [2, 4])
def test_attention_by_head_is_attention(rows, with_bias, batch, monkeypatch):
    """Values, maximum and gradients, the queries as one or in parts (of unequal size), with and
    without gradients and in inference mode, which reuses its buffers: by head where there are more
    heads than images, else by image.
    """
    monkeypatch.setattr(head_maximum, "ROWS", rows)
    bias = draw(batch, 1, 1, 7, seed=9) if with_bias else None
    results = []
    for ours in (True, False):
        q, k, v = (draw(batch, 3, 7, 4, seed=s).requires_grad_() for s in range(3))
        if ours:
            out, peak = attend_with_head_maximum(q, k, v, 0.5, bias, 0.0)
            assert not peak.requires_grad
        else:
            logits = (q * 0.5) @ k.mT
            weights = (logits if bias is None else logits + bias).softmax(dim=-1)
            out, peak = weights @ v, weights.amax(dim=1)
        (out * draw(*out.shape, seed=3)).sum().backward()
        found = [out.detach(), peak.detach()]
        with torch.no_grad():
            untracked = attend_with_head_maximum(q, k, v, 0.5, bias, 0.0)
        with torch.inference_mode():
            reused = attend_with_head_maximum(q.clone(), k.clone(), v.clone(), 0.5, bias, 0.0)
        results.append([*found, q.grad, k.grad, v.grad, *found, *found])
        if ours:
            results[-1][-4:] = [*untracked, *reused]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inference", [False, True])
def test_dropout_spares_the_maximum(inference):
    with torch.inference_mode(inference):
        q, k, v = (draw(1, 2, 6, 4, seed=s) for s in range(3))
        plain, peak = attend_with_head_maximum(q, k, v, 0.5, None, 0.0)
        torch.manual_seed(0)
        dropped, same = attend_with_head_maximum(q, k, v, 0.5, None, 0.5)
        torch.testing.assert_close(peak, same, rtol=0, atol=1e-15)
        assert (plain - dropped).abs().max() > 0.1


@pytest.mark.parametrize("inference", [False, True])
def test_heads_are_joined_without_a_copy(inference):
    """Where they come head by head."""
    with torch.inference_mode(inference):
        out, _ = attend_with_head_maximum(
            *(draw(2, 3, 7, 4, seed=s) for s in range(3)), 0.5, None, 0.0
        )
        assert out.transpose(1, 2).reshape(2, 7, 12).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_the_degrees_are_the_papers(prefix):
    """Two blocks of three, the second on what the first kept."""
    rule, n = TramReduction((4, 4, 2), last=2), 6
    tokens = Tokens(draw(2, prefix + n, 5), prefix)
    expected = torch.zeros(2, n, dtype=torch.float64)
    for block in range(2):
        n = tokens.patches
        peak = draw(2, prefix + n, prefix + n, seed=5 + block).abs()
        for image in range(2):
            among = peak[image, prefix:, prefix:].tolist()
            degree = [sum(among[i][j] for i in range(n)) for j in range(n)]
            for j in range(n):
                second = sum(degree[i] * among[i][j] for i in range(n))
                expected[image, j] += (block + 1) / 3 * second
        q = draw(2, 1, prefix + n, 1)
        attended = Attended(q, q, q, 1.0, None, prefix, prefix > 0, None, peak)
        tokens = rule.reduce(block, tokens, rule.observe(block, tokens, attended))
        if block == 0:
            best = expected.topk(4, dim=1).indices.sort(dim=1).values
            expected = expected.gather(1, best)
        torch.testing.assert_close(tokens.per_patch["degree"], expected)
        assert tokens.patches == 4


def test_nothing_is_read_after_the_last_prune_layer():
    """Nor ever where nothing is dropped: the fused kernel then does all the attention."""
    model = dense("class")
    some = methods.prune(model, "tram", keep_rate=0.5, prune_layers=(1,)).reduction
    assert [some.needs_peak(block) for block in range(4)] == [True, True, False, False]
    none = methods.prune(model, "tram", keep_rate=1.0, prune_layers=(0, 2)).reduction
    assert not any(none.needs_peak(block) for block in range(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_degrees_are_not_rounded_to_half_precision(dtype):
    peak = draw(1, 600, 600).abs().to(dtype)
    said = second_order_degree(peak)
    assert said.dtype is torch.float32
    torch.testing.assert_close(said.double(), second_order_degree(peak.double()), rtol=1e-5, atol=0)
    assert said.unique().numel() > said.to(dtype).unique().numel()


def test_autocast_does_not_round_the_degrees():
    peak = draw(1, 40, 40).abs().float()
    q = draw(1, 1, 40, 1)
    attended = Attended(q, q, q, 1.0, None, 0, False, None, peak)
    rule, tokens = TramReduction((20,), last=0), Tokens(draw(1, 40, 1).float(), 0)
    plain = rule.observe(0, tokens, attended)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rule.observe(0, tokens, attended), plain)


def test_training_and_inference_mode_take_the_same_patches():
    model = methods.prune(dense("registers"), "tram", keep_rate=0.6, prune_layers=(0, 1))
    batch = images(dense("registers"))
    said, trace = recorded(model, batch)
    tracked, training = model(batch, trace=True)
    with torch.inference_mode():
        measured, inference = model(batch, trace=True)
    for logits, other in ((tracked.detach(), training), (measured, inference)):
        torch.testing.assert_close(logits, said, rtol=0, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(trace.group, other.group, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_inference_mode(dtype):
    model = methods.prune(dense("qk_norm"), "tram", keep_rate=0.6, prune_layers=(0, 1)).to(dtype)
    with torch.inference_mode():
        logits = model(images(model, 2))
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.float()(images(model, 2))
    assert logits.dtype is dtype and logits.isfinite().all() and cast.isfinite().all()


def test_dropout_in_attention_trains():
    model = methods.prune(dense("class"), "tram", keep_rate=0.6, prune_layers=(0, 1)).train()
    for block in model.blocks:
        block.attn.attn_drop.p = 0.3
    loss = F.cross_entropy(model(images(model, 2)), torch.tensor([1, 2]))
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
