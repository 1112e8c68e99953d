"""What reductions do in training mode: TNT's noise, DynamicViT's soft masks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.methods.method_settings import CASES, Case, identity
from tests.methods.tiny_models import MODELS, dense, images
from vitpareto import methods
from vitpareto.methods.engine.tokens import Tokens, keep
from vitpareto.methods.token.dynamicvit import Predictor
from vitpareto.methods.token.tnt import noisy_blocks

TNT = {c.label: c for c in CASES if c.method == "tnt"}
DYNAMIC = next(c for c in CASES if str(c) == "dynamicvit-staged")


def training(kind: str, case: Case):
    """(the reduced model in training mode, two images)."""
    model = case.build(dense(kind)).train()
    return model, images(dense(kind), 2)


def ran(model, batch, seed=0):
    """The final tokens of a forward whose draws begin at `seed`."""
    torch.manual_seed(seed)
    return model.run(batch)[0]


@pytest.mark.parametrize("kind", ["class", "registers", "avg"])
@pytest.mark.parametrize("case", TNT.values(), ids=str)
def test_tnt_drops_nothing_and_adds_noise_to_patches(kind, case):
    """After each noisy block a patch has moved by N(0, 1) times 0.02 (1 - alpha); the rest not."""
    model, batch = training(kind, case)
    reduction, shape = model.reduction, methods.model_shape(model)
    tokens = model.embed(batch)
    assert tokens.patches == shape.patches
    for block in range(shape.depth):
        torch.manual_seed(block)
        after = model.run_block(block, tokens)
        plain = methods.prune(dense(kind), "dense").run_block(block, tokens)
        patches = plain.x[:, shape.prefix :]
        expected = torch.zeros_like(plain.x)
        if block < reduction.noisy:
            torch.manual_seed(block)
            alpha = torch.softmax(reduction.heads[block](patches)[..., 0], dim=1)
            moved = 0.02 * (1 - alpha)[..., None] * torch.randn(patches.shape, dtype=patches.dtype)
            expected[:, shape.prefix :] = moved
            assert moved.abs().max() > 0.02
        torch.testing.assert_close(after.x - plain.x, expected, rtol=0, atol=1e-12)
        tokens = after
    assert tokens.patches == shape.patches


def test_tnts_noise_is_that_of_the_published_model():
    assert [noisy_blocks(depth) for depth in (12, 24, 4, 3, 1)] == [5, 10, 2, 2, 1]
    late = Case("tnt", "late", lambda s: {"prune_layers": (3,), "keep_rates": (0.5,)})
    assert training("class", late)[0].reduction.noisy == 4
    assert training("class", TNT["single"])[0].reduction.noisy == 2


def test_tnts_training_is_the_same_for_every_setting():
    """One training serves all: outputs and gradients do not depend on what is dropped later."""
    found = []
    for case in (TNT["several"], TNT["single"], TNT["single-similar"]):
        model, batch = training("class", case)
        torch.manual_seed(3)
        model(batch).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    names = [n for n, _ in model.named_parameters()]
    given = {n for n, g in zip(names, found[0], strict=True) if g is not None and g.abs().max() > 0}
    heads = {n for n in given if n.startswith("reduction.")}
    # a bias moves all of a softmax alike
    assert {n for n in heads if n.endswith("weight")} == {
        "reduction.heads.0.weight", "reduction.heads.1.weight",
    }  # fmt: skip


def test_tnts_normalisation_is_an_option():
    model, batch = training("class", TNT["single"])
    model.reduction.renormalise = True
    model.reduction.base_rate = 0.0
    tokens = model.run_block(0, model.embed(batch))
    assert tokens.x.mean(dim=-1).abs().max() < 1e-12
    assert (tokens.x.var(dim=-1, unbiased=False) - 1).abs().max() < 1e-4
    evaluated = copy.deepcopy(model).eval()
    again, _ = evaluated.run(batch)
    other = TNT["single"].build(dense("class"))
    assert torch.equal(again.x, other.run(batch)[0].x)


def test_a_tnt_choice_reduces_only_where_a_head_was_trained():
    declared, shape = methods.get("tnt"), methods.model_shape(dense("class"))
    for first in (0.0, 1 / 3, 0.75):
        for stages in (1, 4):
            choices = {"keep_rate": 0.9, "first": first, "stages": stages, "spacing": 1 / 6,
                       "similar": 0.1}  # fmt: skip
            layers = declared.resolve(choices, shape)["prune_layers"]
            assert layers and max(layers) < noisy_blocks(shape.depth)


@pytest.mark.parametrize("kind", MODELS)
def test_dynamicvit_masks_what_it_does_not_keep(kind):
    """In training, what is at 0 is as good as dropped: the model without it gives the logits."""
    model, batch = training(kind, DYNAMIC)
    masks = []
    final = ran(model, batch)
    # the masks stage by stage, from the same draws
    torch.manual_seed(0)
    tokens = model.embed(batch)
    for block in range(len(model.blocks)):
        tokens = model.run_block(block, tokens)
        masks.append(tokens.kept)
    logits = model.classify(final)
    assert torch.equal(final.kept, masks[-1])
    assert final.patches == methods.model_shape(model).patches
    stages = [masks[0], masks[1]]
    for kept in stages:
        assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert (stages[1] <= stages[0]).all() and (stages[1] < stages[0]).any()
    plain = methods.prune(dense(kind), "dense")
    for image in range(len(batch)):
        tokens, there = plain.embed(batch[image : image + 1]), torch.arange(final.patches)
        for block in range(len(model.blocks)):
            tokens = plain.run_block(block, tokens)
            if block < 2:
                left = stages[block][image, there] == 1
                tokens = keep(tokens, left.nonzero().T)
                there = there[left]
        with torch.no_grad():
            alone = plain.classify(tokens)[0]
        torch.testing.assert_close(logits[image].detach(), alone, rtol=0, atol=1e-10)


def test_dynamicvits_mask_has_the_papers_gradient():
    """Attention with a mask G: exp(P) G / sum exp(P) G, at G of 0 and of 1 (section 3.3)."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 8, generator=draw, dtype=torch.float64)
    logits = torch.randn(1, 2, 6, 6, generator=draw, dtype=torch.float64)
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 6, 6, generator=draw, dtype=torch.float64)
    ours = (logits + Tokens(x, 1, kept=kept).key_bias(False)).softmax(dim=-1)
    (found,) = torch.autograd.grad((ours * weight).sum(), kept)
    mask = torch.cat([kept.new_ones(1, 1), kept], dim=1)[:, None, None, :].expand(1, 1, 6, 6)
    mask = torch.where(torch.eye(6, dtype=torch.bool), 1.0, mask)
    theirs = logits.exp() * mask
    theirs = theirs / theirs.sum(dim=-1, keepdim=True)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), kept)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert (expected != 0).all()


def test_dynamicvits_penalty_is_the_distance_from_the_schedule():
    model, batch = training("class", DYNAMIC)
    torch.manual_seed(1)
    tokens, stages = model.embed(batch), []
    for block in range(len(model.blocks)):
        tokens = model.run_block(block, tokens)
        if block < 2:
            stages.append(tokens.kept.mean(dim=1))
    targets = [int(16 * 0.6) / 16, int(16 * 0.3) / 16]
    off = torch.stack([(s - t) ** 2 for s, t in zip(stages, targets, strict=True)])
    penalty = model.reduction.penalty(tokens)
    torch.testing.assert_close(penalty, 2 * off.mean())
    penalty.backward()
    for name, p in model.reduction.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    assert model.reduction.predictors[1].out_conv[4].weight.grad.abs().max() > 0
    # nothing of it in evaluation
    model.eval()
    tokens = ran(model, batch)
    assert tokens.kept is None and model.reduction.penalty(tokens) is None


def test_a_predictors_mean_is_over_the_patches_kept():
    torch.manual_seed(0)
    predictor = Predictor(16).double()
    patches = torch.randn(2, 5, 16, dtype=torch.float64)
    kept = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    found = predictor(patches, kept)
    torch.testing.assert_close(found[0, [0, 2, 3]], predictor(patches[:1, [0, 2, 3]])[0])
    torch.testing.assert_close(found[1], predictor(patches)[1])
    assert predictor(patches, torch.zeros_like(kept)).isfinite().all()


@pytest.mark.parametrize("method", ["patchmerger", "dynamicvit", "tnt"])
def test_every_part_that_decides_is_trained(method):
    case = next(c for c in CASES if c.method == method)
    model, batch = training("class", case)
    torch.manual_seed(0)
    tokens, _ = model.run(batch)
    loss = model.classify(tokens).square().sum()
    penalty = model.reduction.penalty(tokens)
    (loss if penalty is None else loss + penalty).backward()
    weights = [n for n, p in model.reduction.named_parameters() if p.dim() == 2]
    if method == "tnt":
        weights = [n for n in weights if int(n.split(".")[1]) < model.reduction.noisy]
    assert weights
    for name in weights:
        grad = model.reduction.get_parameter(name).grad
        assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, name


@pytest.mark.parametrize("method", ["patchmerger", "dynamicvit", "tnt"])
def test_the_identity_adds_nothing_in_training(method):
    model = methods.prune(
        dense("class"), method, **identity(method, methods.model_shape(dense("class")))
    ).train()
    batch = images(dense("class"), 2)
    tokens = ran(model, batch)
    assert torch.equal(tokens.x, methods.prune(dense("class"), "dense").run(batch)[0].x)
    assert model.reduction.penalty(tokens) is None


def test_kept_goes_with_the_patches():
    x = torch.randn(2, 5, 4)
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    tokens = keep(Tokens(x, 1, kept=kept), torch.tensor([[0, 1], [2, 3]]))
    assert tokens.kept.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert replace(tokens, kept=None).pool_weight() is None
    torch.testing.assert_close(tokens.pool_weight(), tokens.kept, rtol=0, atol=1e-14)
