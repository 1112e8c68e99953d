"""NViT: importances by their definition, the greedy removal step by step, a whole trajectory."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.methods.method_settings import recorded
from tests.methods.tiny_models import MODELS, dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code, Recipe, Step
from vitpareto.methods.slicing.greedy import plan
from vitpareto.methods.slicing.importance import Scores, importances, magnitudes, top
from vitpareto.methods.slicing.plan import GROUPS, even, least, macs_cost
from vitpareto.methods.slicing.sliced_model import (
    BlockWidths,
    Widths,
    fixed,
    model_widths,
    slice_model,
    sliced_model,
)
from vitpareto.methods.slicing.trajectory import trajectory

EMBEDDED = ("cls_token", "dist_token", "reg_token", "pos_embed")


def loss(model, batch, labels):
    return F.cross_entropy(model(batch), labels)


def batch_of(model, count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return images(model, count, seed), torch.randint(0, 7, (count,), generator=draw)


def unit(name, p, where, own, block=0, head=0, channel=0):
    """A mask of the weights of one unit in the parameter `name`, or None: the definition of S."""
    mask, at = torch.zeros_like(p, dtype=torch.bool), f"blocks.{block}."
    b = own.blocks[block]
    wide = b.heads * b.qk
    q, v = head * b.qk + channel, head * b.v + channel
    bits = {
        "qk": {"attn.qkv": [q, wide + q]},
        "v": {"attn.qkv": [2 * wide + v], "attn.gate": [v]},
        "heads": {
            "attn.qkv": [
                *range(head * b.qk, (head + 1) * b.qk),
                *range(wide + head * b.qk, wide + (head + 1) * b.qk),
                *range(2 * wide + head * b.v, 2 * wide + (head + 1) * b.v),
            ],
            "attn.gate": list(range(head * b.v, (head + 1) * b.v)),
        },
        "mlp": {f"mlp.{n}": [channel] for n in ("fc1", "fc1_g", "fc1_x")},
    }
    out = {"v": ("attn.proj", [v]), "heads": ("attn.proj", bits["heads"]["attn.gate"])}
    out["mlp"] = ("mlp.fc2", [channel])
    if where == "embedding":
        if name in EMBEDDED or name in ("head.weight", "head_dist.weight"):
            mask[..., channel] = True
        elif any(part in name for part in ("patch_embed", "norm", ".ls", "proj", "fc2")):
            mask[channel] = True
        elif name.endswith("weight"):
            mask[:, channel] = True
    elif name.startswith(at):
        layer, _, kind = name.removeprefix(at).rpartition(".")
        mask[bits[where].get(layer, [])] = True
        if where in out and (layer, kind) == (out[where][0], "weight"):
            mask[:, out[where][1]] = True
    return mask


@pytest.mark.parametrize("kind", ["distilled", "layer_scale", "gated", "swiglu", "sliced"])
def test_an_importance_is_the_squared_derivative_of_scaling_its_weights(kind):
    """(sum of g w)^2 is (d loss / d t)^2 of S's weights times 1 + t, at t = 0."""
    model, own = dense(kind), model_widths(dense(kind))
    batches = [batch_of(model, seed=s) for s in (0, 1)]
    scores = importances(model, batches, loss)
    asked = {
        ("qk", 1, 1, 5): scores.blocks[1].qk[1, 5],
        ("v", 2, 0, 3): scores.blocks[2].v[0, 3],
        ("heads", 0, 1, 0): scores.blocks[0].heads[1],
        ("mlp", 2, 0, 11): scores.blocks[2].mlp[11],
        ("embedding", 0, 0, 9): scores.embedding[9],
    }
    state = dict(model.named_parameters())
    for (where, block, head, channel), found in asked.items():
        masks = {n: unit(n, p, where, own, block, head, channel) for n, p in state.items()}
        expected, tied = 0.0, sum(bool(m.any()) for m in masks.values())
        for batch, labels in batches:
            t = torch.zeros((), dtype=torch.float64, requires_grad=True)
            scaled = {n: p.detach() * (1 + t * masks[n]) for n, p in state.items()}
            value = F.cross_entropy(torch.func.functional_call(model, scaled, batch), labels)
            (slope,) = torch.autograd.grad(value, t)
            expected += slope.item() ** 2
        if where == "embedding":
            expected /= tied
        assert found.item() == pytest.approx(expected, rel=1e-9), where


def test_importances_leave_the_model_alone():
    model = copy.deepcopy(dense("class")).train()
    importances(model, [batch_of(model)], loss)
    assert model.training
    for p, q in zip(model.parameters(), dense("class").parameters(), strict=True):
        assert p.grad is None
        assert torch.equal(p, q)


def test_importances_that_are_not_finite_are_refused():
    model = dense("class")
    good, labels = batch_of(model)
    with refused(Code.OUT_OF_RANGE, name="batches", batch=1):
        importances(model, [(good, labels), (good * torch.nan, labels)], loss)
    with refused(Code.EMPTY, name="batches"):
        importances(model, [], loss)


def drawn(widths, seed=0):
    """Scores as gradients of random weights have them: squared normal numbers."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64) ** 2

    parts = [some(widths.embedding)]
    for b in widths.blocks:
        parts += [some(b.heads), some(b.heads, b.qk), some(b.heads, b.v), some(b.mlp)]
    return Scores.of(parts)


OWN = Widths(64, (BlockWidths(4, 24, 16, 64), BlockWidths(5, 16, 20, 40)))


def product(widths):
    """A cost in which all dimensions meet."""
    e = widths.embedding
    return sum(
        e * b.heads * (2 * b.qk + 2 * b.v) + 2 * e * b.mlp + 17 * b.heads * (b.qk + b.v)
        for b in widths.blocks
    )


def simple(scores, widths, cost, target, eta):
    """The greedy removal, written down again without any bookkeeping: every group of every
    dimension is scored anew for each removal.
    """
    start, floor = widths, least(widths)

    def lowest(values, done, size):
        return values.sort().values[done : done + size].sum().item()

    def value(part, b, now):
        size = GROUPS[part]
        if part == "embedding":
            return lowest(scores.embedding, start.embedding - now.embedding, size)
        own, was, left = scores.blocks[b], start.blocks[b], now.blocks[b]
        done = getattr(was, part) - getattr(left, part)
        if part in ("heads", "mlp"):
            return lowest(getattr(own, part), done, size)
        here = own.heads.argsort()[was.heads - left.heads :]
        return sum(lowest(getattr(own, part)[h], done, size) for h in here)

    def less(part, b, now):
        if part == "embedding":
            return replace(now, embedding=now.embedding - 16)
        blocks = list(now.blocks)
        blocks[b] = replace(blocks[b], **{part: getattr(blocks[b], part) - GROUPS[part]})
        return replace(now, blocks=tuple(blocks))

    def options(now):
        every = [("embedding", -1)]
        every += [(p, b) for b in range(len(now.blocks)) for p in ("heads", "qk", "v", "mlp")]
        for part, b in every:
            here = (now, floor) if part == "embedding" else (now.blocks[b], floor.blocks[b])
            if getattr(here[0], part) > getattr(here[1], part):
                yield part, b

    groups, total = 0, 0.0
    for part, b in options(widths):
        now = widths
        while (part, b) in list(options(now)):
            total += value(part, b, now)
            now, groups = less(part, b, now), groups + 1
    usual, saving = total / groups, (cost(widths) - cost(floor)) / groups
    while cost(widths) > target:
        saved = {o: cost(widths) - cost(less(*o, widths)) for o in options(widths)}
        ends = {o: cost(widths) - s for o, s in saved.items()}

        def score(o, now=widths, saved=saved):
            return value(*o, now) / usual - eta * saved[o] / saving, o

        best = min(saved, key=score)
        if ends[best] < 0.99 * target:
            short = [o for o in ends if 0.99 * target <= ends[o] < cost(widths)]
            nearest = max((e for e in ends.values() if e <= target), default=None)
            best = min(short or [o for o in ends if ends[o] == nearest], key=score)
        widths = less(*best, widths)
    return widths


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_the_greedy_removal_step_by_step(eta, share):
    for seed in range(3):
        scores, target = drawn(OWN, seed), share * product(OWN)
        found = plan(scores, OWN, product, target, eta=eta)
        assert found == simple(scores, OWN, product, target, eta)
        assert product(found) <= target


def test_what_stays_is_what_scores_highest():
    scores = drawn(OWN)
    to = Widths(16, (BlockWidths(2, 8, 16, 16), BlockWidths(3, 16, 4, 24)))
    kept = top(scores, to)
    assert kept.widths == to
    for own, left in zip(scores.blocks, kept.blocks, strict=True):
        assert (
            own.heads[left.heads].min()
            >= own.heads.sort(descending=True).values[len(left.heads) - 1]
        )
        for i, head in enumerate(left.heads):
            rest = torch.ones_like(own.qk[head], dtype=torch.bool)
            rest[left.qk[i]] = False
            assert not rest.any() or own.qk[head][left.qk[i]].min() > own.qk[head][rest].max()
        assert torch.equal(left.mlp, left.mlp.sort().values)


def test_the_least_widths_are_one_group_of_everything():
    blocks = (BlockWidths(2, 8, 8, 16), BlockWidths(3, 8, 12, 24))
    assert least(OWN) == Widths(16, blocks)
    assert least(OWN, ("embedding", "qk")).embedding == 64
    assert least(OWN, ("embedding", "qk")).blocks[0] == BlockWidths(2, 24, 8, 16)
    narrow = Widths(12, (BlockWidths(1, 4, 4, 8),))
    assert least(narrow) == narrow
    floor = product(least(OWN))
    assert plan(drawn(OWN), OWN, product, floor, eta=0.01) == least(OWN)
    asked, least_cost = (floor - 1) / product(OWN), floor / product(OWN)
    with refused(Code.OUT_OF_RANGE, name="target", got=asked, accepted=least_cost):
        plan(drawn(OWN), OWN, product, floor - 1, eta=0.01)
    with refused(Code.OUT_OF_RANGE, name="target", fixed=["embedding", "heads"]):
        plan(drawn(OWN), OWN, product, floor, eta=0.01, fixed=("heads", "embedding"))


def test_what_is_fixed_stays():
    for part in GROUPS:
        left = plan(drawn(OWN), OWN, product, 0.7 * product(OWN), eta=0.01, fixed=(part,))
        if part == "embedding":
            assert left.embedding == OWN.embedding
        else:
            assert [getattr(b, part) for b in left.blocks] == [getattr(b, part) for b in OWN.blocks]


def test_a_cost_of_ones_own_decides():
    """On a device where only heads and q/k width cost, and in steps of 16, only those go."""

    def table(widths):
        return 1.0 + sum(b.heads * -(-b.qk // 16) for b in widths.blocks)

    left = plan(drawn(OWN), OWN, table, 0.7 * table(OWN), eta=100.0)
    assert table(left) <= 0.7 * table(OWN)
    assert left.embedding == 64
    assert [b.mlp for b in left.blocks] == [64, 40]
    assert [b.v for b in left.blocks] == [16, 20]


@pytest.mark.parametrize("kind", MODELS)
def test_the_cost_is_the_models(kind):
    """Of widths that nobody chose; to the unit."""
    model = dense(kind)
    cost, own, held = macs_cost(model), model_widths(model), fixed(model)
    for widths in (own, even(own, cost, 0.7 * cost(own), held), least(own, held)):
        shape = methods.model_shape(sliced_model(model, widths))
        assert cost(widths) == shape.macs(shape.dense_counts(), "mid-block")


PUBLISHED = {"NViT-B": (6.8, 34), "NViT-H": (6.2, 30), "NViT-S": (4.2, 21), "NViT-T": (1.3, 6.9)}


def test_deit_base_at_nvits_targets():
    """GFLOPs within 2 %, parameters within 15 % of NViT's README, with random scores."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_distilled_patch16_224", pretrained=False)
    own, cost, shape = model_widths(model), macs_cost(model), methods.model_shape(model)
    scores, declared = drawn(own), methods.get("nvit")
    for preset in declared.presets:
        giga, millions = PUBLISHED[preset.name]
        target = declared.preset(preset, shape)["target"]
        small = sliced_model(model, plan(scores, own, cost, target * cost(own), eta=0.01))
        dims = methods.model_shape(small)
        assert dims.macs(dims.dense_counts(), "mid-block") / 1e9 == pytest.approx(giga, rel=0.02)
        parameters = sum(p.numel() for p in small.parameters())
        assert parameters / 1e6 == pytest.approx(millions, rel=0.15)


class Training:
    """A few steps of plain gradient descent, the same for the same round."""

    def __init__(self):
        self.rounds = []

    def __call__(self, model, index):
        self.rounds.append(index)
        batch, labels = batch_of(model, seed=100 + index)
        grads = torch.autograd.grad(loss(model, batch, labels), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.01 * g


def scoring(index):
    return [batch_of(dense("class"), seed=index)]


TARGETS = (0.45, 0.8, 0.6)


def run(update=None, start=None, **settings):
    settings = {"share": 0.15, **settings}
    update = update or Training()
    return list(trajectory(dense("class"), TARGETS, scoring, loss, update, start=start, **settings))


def test_a_trajectory_passes_every_target():
    model, update = dense("class"), Training()
    before = copy.deepcopy(model.state_dict())
    rounds = run(update)
    assert update.rounds == [r.index for r in rounds] == list(range(len(rounds)))
    assert [t for r in rounds for t in r.reached] == [0.8, 0.6, 0.45]
    cost, own = macs_cost(model), model_widths(model)
    last = 1.0
    for r in rounds:
        assert r.cost == cost(r.widths) / cost(own)
        assert r.cost < last
        assert all(t >= r.cost for t in r.reached)
        assert r.cost > min((t for t in TARGETS if t not in r.reached), default=0) or r.reached
        last = r.cost
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sizes = [sum(v.numel() for v in r.state.values()) for r in rounds]
    assert sizes == sorted(sizes, reverse=True)


def test_a_trajectory_continues_where_it_stopped():
    rounds = run()
    for at in (0, len(rounds) - 2):
        rest = run(start=rounds[at])
        assert [r.index for r in rest] == [r.index for r in rounds[at + 1 :]]
        for a, b in zip(rest, rounds[at + 1 :], strict=True):
            assert (a.cost, a.widths, a.reached) == (b.cost, b.widths, b.reached)
            assert all(torch.equal(a.state[k], b.state[k]) for k in b.state)
    assert run(start=rounds[-1]) == []


def test_a_round_removes_what_matters_least():
    """One round without training is the slice of the dense model that its scores say."""
    model, (first, *_) = dense("class"), run(lambda model, index: None)
    scores, cost, own = importances(model, scoring(0), loss), macs_cost(model), model_widths(model)
    widths = plan(scores, own, cost, 0.85 * cost(own), eta=0.01)
    assert first.widths == widths
    expected = slice_model(model, top(scores, widths)).state_dict()
    assert all(torch.equal(first.state[k], expected[k]) for k in expected)


def test_targets_are_checked_before_anything_runs():
    def never(*_):
        raise AssertionError("something ran")

    for wrong in (0.0, 1.0, -1, 1.5):
        with refused(Code.OUT_OF_RANGE, name="targets", got=wrong):
            list(trajectory(dense("class"), [0.5, wrong], never, never, never))
    for wrong in (0, -0.1, 2):
        with refused(Code.OUT_OF_RANGE, name="share", got=wrong):
            list(trajectory(dense("class"), [0.5], never, never, never, share=wrong))
    with refused(Code.OUT_OF_RANGE, name="target") as caught:
        list(trajectory(dense("class"), [0.5, 0.1], never, never, never))
    assert 0.19 < caught.value.details["accepted"] < 0.2
    with refused(Code.OUT_OF_RANGE, name="target", fixed=["heads", "mlp", "v"]):
        list(trajectory(dense("scale_norm"), [0.3], never, never, never))


def test_a_snapshot_is_a_recipe_with_weights():
    """Its dimensions are read from them; a token step goes on top."""
    model, done = dense("class"), run()[-1]
    digest = methods.weights_digest(done.state)
    text = f"structure: {{method: nvit, target: 0.45}}\nweights: '{digest}'\n"
    recipe = Recipe.from_yaml(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = recipe.build(model, weights=done.state)
    assert model_widths(built) == done.widths
    assert built.recipe.weights == digest
    plain = sliced_model(model, done.widths)
    plain.load_state_dict(done.state)
    assert torch.equal(recorded(built, images(model))[0], plain(images(model)))
    both = replace(recipe, tokens=Step("topk", {"keep_rate": 0.5, "prune_layers": (1,)}))
    _, trace = recorded(both.build(model, weights=done.state), images(model))
    assert trace.tokens[-1].tolist() == [9] * 4
    shape, _ = recipe.reshape(methods.model_shape(model), model, done.state)
    assert shape == methods.model_shape(plain)
    with refused(Code.MISSING, name="weights", expected=digest):
        recipe.reshape(methods.model_shape(model), model)
    with refused(Code.MISSING, name="weights", expected=digest):
        recipe.build(model)


def test_widths_and_weights_must_agree():
    model, done = dense("class"), run()[-1]
    plain = done.widths.to_plain()
    recipe = Recipe.of("nvit", widths=plain)
    assert model_widths(recipe.build(model, weights=done.state)) == done.widths
    plain["blocks"][0][3] += 16
    with refused(Code.MISMATCH, name="widths", where="nvit", expected=done.widths.to_plain()):
        Recipe.of("nvit", widths=plain).build(model, weights=done.state)
    with refused(Code.MISMATCH, name="weights", missing="blocks.0.attn.widths"):
        Recipe.of("nvit", target=0.5).build(model, weights=model.state_dict())


def test_without_weights_a_target_means_even_widths():
    model = dense("distilled")
    own, cost = model_widths(model), macs_cost(model)
    with pytest.warns(methods.Untrained):
        built = methods.prune(model, "nvit", target=0.7)
    widths = even(own, cost, 0.7 * cost(own))
    assert model_widths(built) == widths
    assert cost(widths) <= 0.7 * cost(own)
    expected = slice_model(model, top(magnitudes(model), widths))
    assert torch.equal(recorded(built, images(model))[0], expected(images(model)))
    # costs are known before weights are: on a skeleton too
    skeleton = copy.deepcopy(model).to("meta")
    shape, _ = Recipe.of("nvit", target=0.7).reshape(methods.model_shape(skeleton), skeleton)
    assert shape == methods.model_shape(built)
    with torch.device("meta"):
        base = timm.create_model("deit_base_patch16_224", pretrained=False)
    own, cost = model_widths(base), macs_cost(base)
    half = Widths(384, (BlockWidths(6, 64, 64, 1536),) * 12)
    assert even(own, cost, cost(half)) == half


def test_magnitudes_are_sums_of_squares():
    model = dense("class")
    found, state = magnitudes(model), model.state_dict()
    rows = state["blocks.1.mlp.fc1.weight"].square().sum(1)
    rows = rows + state["blocks.1.mlp.fc1.bias"].square()
    rows = rows + state["blocks.1.mlp.fc2.weight"].square().sum(0)
    torch.testing.assert_close(found.blocks[1].mlp, rows, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "code, params",
    [(Code.MISSING, {}), (Code.CONFLICT, {"target": 0.5, "widths": OWN.to_plain()})],
)
def test_a_target_or_widths(code, params):
    with refused(code, name="target"):
        methods.prune(dense("class"), "nvit", **params)


def test_the_space_has_few_targets():
    declared, shape = methods.get("nvit"), methods.model_shape(dense("class"))
    assert declared.resolve({"cost": 0.613}, shape) == {"target": 0.6}
    assert declared.resolve({"cost": 0.2}, shape) == {"target": 0.2}
    assert declared.resolve({"cost": 0.9}, shape) == {"target": 0.9}


def test_equal_dimensions_are_one_candidate():
    """Whatever target they came from, until weights tell them apart."""
    model = dense("class")
    keys = set()
    for target in (0.7, 0.69):
        recipe = Recipe.of("nvit", target=target)
        keys.add(recipe.key(recipe.reshape(methods.model_shape(model), model)[0]))
    assert len(keys) == 1


def test_what_is_calibrated_on_a_snapshot_is_the_snapshot():
    """Its weights are loaded before the calibration images are seen, not after."""
    model, seen = dense("class"), images(dense("class"), 6, seed=99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", methods.Untrained)
        cut = methods.prune(model, "nvit", target=0.6)
    with torch.no_grad():
        for p in cut.parameters():
            p.mul_(1.5)
    rajni = Step("rajni", methods.get("rajni").check({"gamma": 1.0, "min_tokens": 2}))
    recipe = Recipe(Step("nvit", methods.get("nvit").check({"target": 0.6})), rajni)
    built = recipe.build(model, calibration=seen, weights=cut.state_dict())
    with torch.no_grad():
        expected = methods.get("rajni").calibrate(cut, dict(rajni.params), [seen])
    assert built.recipe.tokens.params["counts"] == expected["counts"]
