"""What every method guarantees, at every setting on every kind of model.

One forward per pair serves all invariants. The fast lane runs `PAIRS`; the slow lane runs the full
product. State, gradients, programs and input sizes have files of their own.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.methods.method_settings import (
    CASES,
    EVERY,
    PAIRS,
    REFUSED,
    SETTINGS,
    Case,
    identity,
    logits,
    pairs,
    pruned,
    recorded,
)
from tests.methods.tiny_models import MODELS, dense, fresh, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code
from vitpareto.methods.engine.reduction import Reduction


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@cache
def original(kind: str) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """State dict, module names and logits of a model of that kind that nothing was done to."""
    model = fresh(kind)
    return model.state_dict(), [n for n, _ in model.named_modules()], logits(model, images(model))


@cache
def with_dropout(kind: str) -> tuple[nn.Module, Tensor]:
    """The dense model in training mode with dropout, and its logits from seed 5."""
    model = copy.deepcopy(dense(kind)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    torch.manual_seed(5)
    with torch.no_grad():
        return model, model(images(model))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", methods.names())
def test_identity_gives_the_dense_logits(kind, method):
    """In training mode too: the reduced forward draws dropout and drop path in timm's order."""
    params = identity(method, methods.model_shape(dense(kind)))
    if params is None:
        assert "no identity" in (methods.get(method).__doc__ or "")
        return
    model, expected = with_dropout(kind)
    batch, reduced = images(model), methods.prune(model, method, **params)
    torch.manual_seed(5)
    with torch.no_grad():
        close(reduced(batch), expected, 1e-12)
    close(logits(reduced.eval(), batch), original(kind)[2], 1e-12)


@pairs(EVERY, fast=PAIRS)
def test_invariants(kind, case: Case):
    reduced = pruned(kind, case)
    batch = images(dense(kind))
    together, trace = recorded(reduced, batch)
    check_effect(kind, case, together, trace)
    check_independence_of_the_batch(reduced, batch, together, trace)
    check_counts(case, reduced, trace)
    check_groups(case, reduced, trace)
    check_head(reduced, batch, together)
    check_state(kind, case)


def check_effect(kind: str, case: Case, together: Tensor, trace: methods.Trace) -> None:
    """The output is that of a pruned model: a method that does nothing would pass otherwise."""
    model, reduced, plain = dense(kind), pruned(kind, case), original(kind)[2]
    assert together.shape == plain.shape
    assert together.isfinite().all()
    if methods.get(case.method).kind == "structure":
        assert methods.model_shape(reduced) != methods.model_shape(model)
        assert (together - plain).abs().max() > 1e-4
    elif case.method != "dense":
        full = len(together) * (methods.model_shape(model).patches + model.num_prefix_tokens)
        assert trace.tokens[-1].sum() < full
        # a drop in the last block alone does not reach a class token
        if trace.tokens[-2].sum() < full:
            assert (together - plain).abs().max() > 1e-4


def check_independence_of_the_batch(
    reduced: nn.Module, batch: Tensor, together: Tensor, trace: methods.Trace
) -> None:
    for i in (0, 2):
        alone, own = recorded(reduced, batch[i : i + 1])
        # kernels differ with the batch size: float64 rounding, no more
        close(alone[0], together[i])
        assert [int(t[0]) for t in own.tokens] == [int(t[i]) for t in trace.tokens]
        assert torch.equal(torch.cat(own.group), torch.stack([g[i] for g in trace.group]))


def check_counts(case: Case, reduced: nn.Module, trace: methods.Trace) -> None:
    """Token counts are those of the schedule, or within its bounds if each image decides."""
    shape, declared = methods.model_shape(reduced), methods.get(case.method)
    assert len(trace.tokens) == len(trace.group) == len(trace.figures) == shape.depth
    step = reduced.recipe.tokens
    counts, (low, high) = shape.dense_counts(), (shape.dense_counts(),) * 2
    if step is not None:
        counts = declared.counts(step.params, shape)
        low, high = declared.bounds(step.params, shape)
    assert (counts is None) == case.per_image
    for block, tokens in enumerate(trace.tokens):
        patches = (tokens - shape.prefix).tolist()
        assert all(low[block] <= n <= high[block] for n in patches)
        if counts is not None:
            assert set(patches) == {counts[block]}


def check_groups(case: Case, reduced: nn.Module, trace: methods.Trace) -> None:
    """`Trace.group` follows every original patch: dropped stays dropped, merged stays merged."""
    shape, mixes = methods.model_shape(reduced), methods.get(case.method).mixes
    batch = len(trace.tokens[0])
    before = [list(range(shape.patches))] * batch
    for tokens, group in zip(trace.tokens, trace.group, strict=True):
        assert group.shape == (batch, shape.patches)
        assert group.min() >= -1
        now = group.tolist()
        for own, was, left in zip(now, before, (tokens - shape.prefix).tolist(), strict=True):
            held = {token for token in own if token >= 0}
            assert max(held) < left
            if not mixes:
                assert held == set(range(left))
            moves = set(zip(was, own, strict=True))
            assert all(to == -1 for token, to in moves if token == -1)
            assert len(moves) == len(set(was))
        before = now


def check_head(reduced: nn.Module, batch: Tensor, together: Tensor) -> None:
    """`forward_head` of `forward_features` is the model, or is refused."""
    with torch.no_grad():
        features = reduced.forward_features(batch)
        if reduced.global_pool != "token" and reduced.recipe.tokens is not None:
            with pytest.raises(NotImplementedError):
                reduced.forward_head(features)
        else:
            assert torch.equal(reduced.forward_head(features), together)


def check_state(kind: str, case: Case) -> None:
    """The state dict has timm's names, the dense model is unchanged, and nothing is shared."""
    before, modules, _ = original(kind)
    model, own = dense(kind), pruned(kind, case).state_dict()
    # a sliced block stores its widths beside its weights
    added = [k for k in own if k not in before]
    assert all(k.startswith("reduction.") or k.endswith(".attn.widths") for k in added)
    assert [k for k in own if k in before] == list(before)
    if methods.get(case.method).kind == "tokens":
        assert all(torch.equal(own[k], before[k]) for k in before)
    after = model.state_dict()
    assert type(model) is type(fresh(kind))
    assert [name for name, _ in model.named_modules()] == modules
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    storages = {t.untyped_storage().data_ptr() for t in after.values()}
    assert not storages & {t.untyped_storage().data_ptr() for t in own.values()}


#: methods that drop embedded patches change what enters block 0
AFTER_BLOCK = [
    case
    for case in CASES
    if methods.get(case.method).site == "after-block"
    and not methods.get(case.method).mixes
    and str(case) != "tnt-several-similar"
]


@pytest.mark.parametrize("case", AFTER_BLOCK, ids=str)
def test_after_block_keeps_rows_as_they_are(case: Case):
    """After the first block that drops, the tokens left are the dense model's, by `group`."""
    model, reduced = dense("avg"), pruned("avg", case)
    batch, plain = images(model), methods.prune(model, "dense")
    with torch.no_grad():
        own, full = reduced.embed(batch, trace=True), plain.embed(batch)
        for block in range(len(model.blocks)):
            own, full = reduced.run_block(block, own), plain.run_block(block, full)
            if own.counts().sum() < full.counts().sum():
                break
        else:
            pytest.fail("nothing was dropped")
    for image, group in enumerate(own.group):
        for patch, place in enumerate(group.tolist()):
            if place >= 0:
                close(own.x[image, place], full.x[image, patch])


@pytest.mark.parametrize("method", methods.names("tokens"))
def test_presets_resolve_on_every_model(method):
    declared = methods.get(method)
    for kind in MODELS:
        shape = methods.model_shape(dense(kind))
        for preset in declared.presets:
            params = declared.preset(preset, shape)
            assert isinstance(declared.reduction(params, shape), Reduction) or (
                declared.needs_calibration(params)
            )


def test_settings_belong_to_registered_methods():
    assert set(SETTINGS) == set(methods.names())


@pytest.mark.parametrize(
    "case, kind", [(c, k) for c in CASES for k in REFUSED.get(c.method, {})], ids=str
)
def test_unsupported_pairs_are_refused(case: Case, kind):
    model = dense(kind)
    part = REFUSED[case.method][kind]
    with refused(Code.UNSUPPORTED, methods.UnsupportedModel, part=part):
        methods.prune(model, case.method, **case.params(methods.model_shape(model)))
