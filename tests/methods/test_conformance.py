"""Every method at every setting on every kind of model: what all methods promise, in one table."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled

from tests.methods.method_settings import (
    CASES,
    EVERY,
    FIRST,
    PAIRS,
    REFUSED,
    SETTINGS,
    Case,
    identity,
    pruned,
    recorded,
)
from tests.methods.tiny_models import MODELS, dense, images, vit
from vitpareto import methods
from vitpareto.methods.engine import forward
from vitpareto.methods.engine.reduction import Reduction

every_model = pytest.mark.parametrize("kind", MODELS)
some_pairs = pytest.mark.parametrize(
    "kind, case", PAIRS, ids=[f"{kind}-{case}" for kind, case in PAIRS]
)
every_pair = pytest.mark.parametrize(
    "kind, case", EVERY, ids=[f"{kind}-{case}" for kind, case in EVERY]
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def logits(model, batch):
    with torch.no_grad():
        return model(batch)


def close(a, b, off=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=off)


@every_model
@pytest.mark.parametrize("method", methods.names())
def test_identity_gives_the_dense_logits(kind, method):
    model = dense(kind)
    params = identity(method, methods.model_shape(model))
    if params is None:
        assert (methods.get(method).__doc__ or "").find("no identity") >= 0
        return
    batch = images(model)
    close(logits(methods.prune(model, method, **params), batch), logits(model, batch), 1e-12)


@every_model
@pytest.mark.parametrize("method", [m for m in methods.names() if not methods.get(m).control])
def test_identity_is_dense_in_training_too(kind, method):
    """Same dropout draws, same drop path: the reduced forward asks for them in timm's order."""
    model = copy.deepcopy(dense(kind)).train()
    params = identity(method, methods.model_shape(model))
    if params is None:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    reduced, batch = methods.prune(model, method, **params), images(model)
    torch.manual_seed(5)
    expected = model(batch)
    torch.manual_seed(5)
    close(reduced(batch), expected, 1e-12)


@every_pair
def test_an_image_does_not_depend_on_its_batch(kind, case: Case):
    model, reduced = dense(kind), pruned(kind, case)
    batch = images(model)
    together, trace = recorded(reduced, batch)
    plain = logits(model, batch)
    assert together.shape == plain.shape
    assert together.isfinite().all()
    # a method that quietly does nothing would pass every other test
    if methods.get(case.method).kind == "structure":
        assert methods.model_shape(reduced) != methods.model_shape(model)
        assert (together - plain).abs().max() > 1e-4
    elif case.method != "dense":
        # what only the last block drops does not reach a class token
        full = methods.model_shape(model).patches + model.num_prefix_tokens
        assert trace.tokens[-1].sum() < len(batch) * full
        if trace.tokens[-2].sum() < len(batch) * full:
            assert (together - plain).abs().max() > 1e-4
    for i in (0, 2):
        alone, own = recorded(reduced, batch[i : i + 1])
        # different kernels for different batch sizes: float64 rounding, no more
        close(alone[0], together[i])
        for block, tokens in enumerate(own.tokens):
            assert tokens[0] == trace.tokens[block][i]
            assert torch.equal(own.group[block][0], trace.group[block][i])


@some_pairs
def test_state_dict_is_timms_and_the_model_stays_as_it_was(kind, case: Case):
    model = copy.deepcopy(dense(kind))
    before, batch = copy.deepcopy(model.state_dict()), images(model)
    said, names = logits(model, batch), dict(model.named_modules()).keys()
    reduced = case.build(model)
    own = reduced.state_dict()
    # a sliced block writes its widths down beside its weights
    added = [k for k in own if k not in before]
    assert all(k.startswith("reduction.") or k.endswith(".attn.widths") for k in added)
    assert [k for k in own if k in before] == list(before)
    if methods.get(case.method).kind == "tokens":
        assert all(torch.equal(own[k], before[k]) for k in before)
    assert type(model) is type(MODELS[kind]())
    assert list(dict(model.named_modules())) == list(names)
    with torch.no_grad():
        for p in reduced.parameters():
            p.zero_()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(logits(model, batch), said)


@some_pairs
def test_copies_pickles_and_rebuilds(kind, case: Case):
    model, reduced = dense(kind), pruned(kind, case)
    batch = images(model, 2)
    expected = logits(reduced, batch)
    assert torch.equal(logits(copy.deepcopy(reduced), batch), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(reduced)), batch), expected)
    recipe = methods.Recipe.from_yaml(reduced.recipe.to_yaml())
    assert recipe.checked(methods.model_shape(reduced)) == reduced.recipe
    assert torch.equal(logits(recipe.build(model, weights=reduced.state_dict()), batch), expected)


@every_case
def test_two_threads_at_once(case: Case):
    reduced = pruned("registers", case)
    batches = [images(dense("registers"), 3, seed) for seed in range(6)]
    one_by_one = [logits(reduced, batch) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(lambda batch: logits(reduced, batch), batches))
    for a, b in zip(one_by_one, at_once, strict=True):
        assert torch.equal(a, b)


@cache
def reached(kind):
    """The dense model's parameters that get a gradient."""
    model = copy.deepcopy(dense(kind)).train()
    model(images(model, 2)).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@some_pairs
def test_gradients_reach_what_they_reach_in_the_dense_model(kind, case: Case):
    reduced, batch = copy.deepcopy(pruned(kind, case)).train(), images(dense(kind), 2)
    reduced(batch).square().sum().backward()
    own = {n: p.grad for n, p in reduced.named_parameters() if not n.startswith("reduction.")}
    expected = reached(kind)
    assert {name for name, grad in own.items() if grad is not None} == expected
    assert all(grad.isfinite().all() for grad in own.values() if grad is not None)
    for name in expected:
        assert own[name].abs().max() > 0, name


@every_pair
def test_trace_tells_where_every_patch_went(kind, case: Case):
    reduced, batch = pruned(kind, case), images(dense(kind))
    shape, declared = methods.model_shape(reduced), methods.get(case.method)
    _, trace = recorded(reduced, batch)
    assert len(trace.tokens) == len(trace.group) == len(trace.figures) == shape.depth
    step = reduced.recipe.tokens
    counts, bounds = shape.dense_counts(), (shape.dense_counts(),) * 2
    if step is not None:
        counts = declared.counts(step.params, shape)
        bounds = declared.bounds(step.params, shape)
    assert (counts is None) == case.per_image
    before = torch.arange(shape.patches).repeat(len(batch), 1)
    for block, (tokens, group) in enumerate(zip(trace.tokens, trace.group, strict=True)):
        patches = tokens - shape.prefix
        if counts is not None:
            assert (patches == counts[block]).all()
        assert (patches >= bounds[0][block]).all()
        assert (patches <= bounds[1][block]).all()
        assert group.shape == (len(batch), shape.patches)
        assert group.min() >= -1
        for own, was, left in zip(group, before, patches, strict=True):
            held = own[own >= 0].unique()
            assert held.max() < left
            if not declared.mixes:
                assert torch.equal(held, torch.arange(int(left)))
            assert (own[was == -1] == -1).all()
            # what was merged stays together
            for token in was[was >= 0].unique():
                assert own[was == token].unique().numel() == 1
        before = group


#: what drops embedded patches leaves other tokens in block 0 already
AFTER_BLOCK = [
    case
    for case in CASES
    if methods.get(case.method).site == "after-block"
    and not methods.get(case.method).mixes
    and str(case) != "tnt-several-similar"
]


@pytest.mark.parametrize("case", AFTER_BLOCK, ids=str)
def test_after_block_keeps_rows_as_they_are(case: Case):
    """At the first block that drops, the tokens left are those of the dense model, by `group`."""
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


@pytest.mark.parametrize("method", [m for m in methods.names() if methods.get(m).kind == "tokens"])
def test_presets_and_spaces_resolve_on_every_model(method):
    declared = methods.get(method)
    for kind in MODELS:
        shape = methods.model_shape(dense(kind))
        for preset in declared.presets:
            params = declared.preset(preset, shape)
            assert isinstance(declared.reduction(params, shape), Reduction) or (
                declared.needs_calibration(params)
            )


#: what is built as these kinds are, at any size
SIZED = {
    "class": vit,
    "distilled": partial(vit, VisionTransformerDistilled, num_heads=4),
    "registers": partial(vit, reg_tokens=3, no_embed_class=True, init_values=0.5),
    "map": partial(vit, class_token=False, global_pool="map"),
}


SIZED_PAIRS = [(kind, case) for kind, case in PAIRS if kind in SIZED and case in FIRST]


@pytest.mark.parametrize(
    "kind, case", SIZED_PAIRS, ids=[f"{kind}-{case}" for kind, case in SIZED_PAIRS]
)
def test_another_resolution(kind, case: Case):
    """A model given another input size before pruning is the model built at that size."""
    resized = copy.deepcopy(dense(kind))
    resized.set_input_size(img_size=(48, 64))
    built = SIZED[kind](img_size=(48, 64)).double().eval()
    built.load_state_dict(resized.state_dict())
    shape, batch = methods.model_shape(built), images(built, 2)
    assert shape == methods.model_shape(resized)
    assert shape.grid == (6, 8)
    expected, trace = recorded(case.build(built), batch)
    said, own = recorded(case.build(resized), batch)
    assert torch.equal(said, expected)
    assert all(torch.equal(a, b) for a, b in zip(own.group, trace.group, strict=True))
    close(logits(case.build(resized), batch[1:])[0], said[1])
    params = methods.get(case.method).check(case.params(shape), shape)
    counts = methods.get(case.method).counts(params, shape)
    if counts is not None and methods.get(case.method).kind == "tokens":
        assert [t.tolist() for t in own.tokens] == [[n + shape.prefix] * 2 for n in counts]


def exported(case: Case) -> bool:
    shape, declared = methods.model_shape(dense("class_avg")), methods.get(case.method)
    params = declared.check(case.params(shape), shape)
    return declared.refuses_export(params, shape) == ""


#: each method's first setting of which there is a program
EXPORTED = list({case.method: case for case in reversed(CASES) if exported(case)}.values())


def held(model):
    """Everything that hangs on a model's modules: names, types, attributes' names."""
    return [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]


@pytest.mark.parametrize("case", EXPORTED, ids=str)
def test_export_leaves_the_model_as_it_was(case: Case):
    """And its program, for any batch, is the model."""
    reduced, batch = case.build(dense("class_avg")), images(dense("class_avg"), 5)
    # before the first forward: that too sets nothing on a module
    there = held(reduced)
    expected, before = logits(reduced, batch), copy.deepcopy(reduced.state_dict())
    free = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(reduced, (batch[:2],), dynamic_shapes=free)
    assert torch.equal(logits(reduced, batch), expected)
    assert held(reduced) == there
    after = reduced.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    for count in (1, 5):
        close(logits(program.module(), batch[:count]), expected[:count])


@pytest.mark.parametrize("case", [case for case in EXPORTED if not case.per_image], ids=str)
def test_compiles_as_one_graph(case: Case):
    """A break would run what follows eagerly: slow on a GPU, and nobody would be told. Only where
    each image decides its count the shapes of what follows hang on the data.
    """
    reduced, batch = pruned("class", case), images(dense("class"))
    torch._dynamo.reset()
    compiled = torch.compile(reduced, backend="eager", fullgraph=True)
    close(logits(compiled, batch), logits(reduced, batch))
    with torch.inference_mode():
        close(compiled(batch.clone()), logits(reduced, batch))


@some_pairs
def test_gradient_checkpointing_is_kept(kind, case: Case):
    """The same gradients, with each block's activations and draws made a second time."""
    batch, found, entered = images(dense(kind), 2), [], []
    for on in (False, True):
        reduced = copy.deepcopy(pruned(kind, case)).train()
        for module in reduced.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        reduced.set_grad_checkpointing(on)
        torch.manual_seed(5)
        reduced.blocks[1].norm1.register_forward_pre_hook(lambda *_: entered.append(1))
        reduced(batch).square().sum().backward()
        found.append([p.grad for p in reduced.parameters()])
    assert len(entered) == 1 + 2
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.equal(plain, again)


def test_checkpointing_restores_the_device_s_draws(monkeypatch):
    """torch saves the random state of the devices of those tensors that are arguments."""
    reduced = copy.deepcopy(pruned("class", FIRST[0])).train()
    reduced.set_grad_checkpointing()
    seen = []

    def recorded_checkpoint(function, *args, **kwargs):
        seen.append([type(a) for a in args])
        return function(*args)

    monkeypatch.setattr(forward, "checkpoint", recorded_checkpoint)
    reduced(images(dense("class"), 2))
    assert seen == [[torch.Tensor]] * len(reduced.blocks)


@some_pairs
def test_head_and_features_are_the_model_or_refused(kind, case: Case):
    reduced, batch = pruned(kind, case), images(dense(kind))
    with torch.no_grad():
        features = reduced.forward_features(batch)
        if reduced.global_pool != "token" and reduced.recipe.tokens is not None:
            with pytest.raises(NotImplementedError, match="call the model itself"):
                reduced.forward_head(features)
        else:
            assert torch.equal(reduced.forward_head(features), reduced(batch))


def test_every_method_has_a_program():
    assert {case.method for case in EXPORTED} == set(methods.names())


def test_another_image_size_is_refused_where_a_schedule_is_fixed():
    model = dense("dynamic")
    larger = torch.zeros(1, 3, 48, 48, dtype=torch.float64)
    assert logits(methods.prune(model, "dense"), larger).shape == (1, 7)
    with pytest.raises(methods.BadInput, match="36 patches: this model is pruned for 4 x 4"):
        methods.prune(model, "topk", keep_rate=0.5)(larger)


def test_a_setting_for_what_is_not_registered_is_noticed():
    assert set(SETTINGS) == set(methods.names())


@pytest.mark.parametrize(
    "case, kind", [(c, k) for c in CASES for k in REFUSED.get(c.method, {})], ids=str
)
def test_what_a_method_cannot_do_it_refuses_by_name(case: Case, kind):
    model = dense(kind)
    with pytest.raises(methods.UnsupportedModel, match=REFUSED[case.method][kind]):
        methods.prune(model, case.method, **case.params(methods.model_shape(model)))
