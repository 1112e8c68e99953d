"""The pure functions on tokens against slow ones written from the papers' words."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.refusals import refused
from vitpareto.methods import Code
from vitpareto.methods.engine.attention import Attended
from vitpareto.methods.engine.merging import bipartite_match, merge_matched
from vitpareto.methods.engine.schedules import scale_layers, staged_counts
from vitpareto.methods.engine.tokens import Tokens, keep, keep_padded, top_k
from vitpareto.methods.token.rajni.rajni_reduction import RajniReduction
from vitpareto.methods.token.rajni.scores import ranking, read


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(batch: int, prefix: int, n: int, seed: int = 0) -> Tokens:
    return Tokens(
        draw(batch, prefix + n, 5, seed=seed), prefix, group=torch.arange(n).repeat(batch, 1)
    )


def merge_slowly(x: Tensor, metric: Tensor, size: list[float], prefix: int, r: int):
    """ToMe on one image, in words: returns (rows, sizes, the row that holds each patch)."""
    first = [i for i in range(prefix, len(x)) if i % 2 == 0]
    second = [i for i in range(prefix, len(x)) if i % 2 == 1]
    edges = []
    for a in first:
        likeness = [
            float(metric[a] @ metric[b] / (metric[a].norm() * metric[b].norm())) for b in second
        ]
        best = max(range(len(second)), key=lambda j, likeness=likeness: likeness[j])
        edges.append((likeness[best], a, second[best]))
    goes = {a: b for _, a, b in sorted(edges, reverse=True)[:r]}
    order = [a for a in first if a not in goes] + second
    rows, sizes, place = [], [], {}
    for index, i in enumerate(order):
        members = [i] + [a for a, b in goes.items() if b == i]
        total = sum(size[m - prefix] for m in members)
        rows.append(sum(x[m] * size[m - prefix] for m in members) / total)
        sizes.append(total)
        for m in members:
            place[m - prefix] = index
    return torch.stack([*x[:prefix], *rows]), torch.tensor(sizes), place


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [2, 7, 12])
def test_merging_is_the_papers(prefix, n):
    tokens, sizes = fresh(3, prefix, n), [[1.0] * n for _ in range(3)]
    # twice, so that the second merge starts from unequal sizes
    for step in range(2):
        n = tokens.patches
        r = n // 2 if step else max(1, n // 3)
        if r == 0:
            continue
        metric = draw(3, prefix + n, 4, seed=7 + step)
        merged = merge_matched(tokens, bipartite_match(metric, prefix, r))
        for i in range(3):
            rows, size, place = merge_slowly(tokens.x[i], metric[i], sizes[i], prefix, r)
            torch.testing.assert_close(merged.x[i], rows, rtol=0, atol=1e-12)
            torch.testing.assert_close(merged.size[i], size.double(), rtol=0, atol=0)
            assert merged.group[i].tolist() == [place[g] for g in tokens.group[i].tolist()]
            sizes[i] = size.tolist()
        tokens = merged
    weight = tokens.size[..., None]
    total = (tokens.x[:, prefix:] * weight).sum(dim=1)
    torch.testing.assert_close(total, fresh(3, prefix, len(tokens.group[0])).x[:, prefix:].sum(1))


def test_keep_follows_everything_that_travels():
    tokens = Tokens(
        draw(2, 6, 3), 2, size=draw(2, 4).exp(), per_patch={"s": draw(2, 4, 2)},
        per_image={"e": draw(2)}, group=torch.tensor([[0, 1, 2, 3, 3], [3, -1, 0, 1, 2]]),
    )  # fmt: skip
    index = torch.tensor([[1, 3], [0, 2]])
    kept = keep(tokens, index)
    for i, rows in enumerate(index.tolist()):
        assert torch.equal(kept.x[i, 2:], tokens.x[i, 2:][rows])
        assert torch.equal(kept.size[i], tokens.size[i][rows])
        assert torch.equal(kept.per_patch["s"][i], tokens.per_patch["s"][i][rows])
    assert torch.equal(kept.x[:, :2], tokens.x[:, :2])
    assert kept.per_image is tokens.per_image
    assert kept.group.tolist() == [[-1, 0, -1, 1, 1], [-1, -1, 0, -1, 1]]
    assert kept.valid is None


def test_top_k_is_in_order():
    score = torch.tensor([[0.1, 5.0, 3.0, 4.0], [9.0, 1.0, 2.0, 8.0]])
    assert top_k(score, 2).tolist() == [[1, 3], [0, 3]]


def test_keep_padded_is_each_image_alone():
    tokens, score = fresh(4, 1, 9), draw(4, 9, seed=3)
    count = torch.tensor([9, 4, 1, 6])
    for step in range(2):
        padded = keep_padded(tokens, score, count)
        assert padded.patches == int(count.max())
        for i in range(4):
            n = int(count[i])
            own = tokens.x[i, 1:]
            if tokens.valid is not None:
                own = own[tokens.valid[i]]
            best = score[i][: len(own)].topk(n).indices.sort().values
            assert torch.equal(padded.x[i, 1 : 1 + n], own[best])
            valid = torch.ones(padded.patches) if padded.valid is None else padded.valid[i]
            assert valid.tolist() == [k < n for k in range(padded.patches)]
            held = padded.group[i][padded.group[i] >= 0]
            assert held.tolist() == list(range(n))
        assert torch.equal(padded.counts(), count + 1)
        # again from a padded batch; the second score ranks padding highest: it must not be kept
        tokens = padded
        score = draw(4, tokens.patches, seed=4 + step)
        score = score.masked_fill(~tokens.valid, 99.0)
        count = torch.tensor([5, 4, 1, 2])


def test_keep_padded_without_a_difference_has_no_mask():
    assert keep_padded(fresh(2, 1, 5), draw(2, 5), torch.tensor([3, 3])).valid is None


def test_key_bias_and_pool_weight():
    x, size = draw(2, 5, 3), torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 1.0]]).double()
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert Tokens(x, 2).key_bias(True) is None
    assert Tokens(x, 2).pool_weight() is None
    assert Tokens(x, 2, size=size).key_bias(False) is None
    bias = Tokens(x, 2, size=size).key_bias(True)
    assert bias.shape == (2, 1, 1, 5)
    assert bias[1, 0, 0].tolist() == pytest.approx([0, 0, math.log(4), 0, 0])
    both = Tokens(x, 2, size=size, valid=valid)
    expected = [0, 0, 0, math.log(2), -math.inf]
    assert both.key_bias(True)[0, 0, 0].tolist() == pytest.approx(expected)
    assert both.key_bias(False)[0, 0, 0].tolist() == [0, 0, 0, 0, -math.inf]
    assert both.pool_weight().tolist() == [[1, 2, 0], [4, 1, 1]]
    assert both.counts().tolist() == [4, 5]


def test_proportional_attention_is_attention_to_copies():
    """log s on a key is what s equal keys would get (ToMe, equation 1)."""
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    bias = torch.tensor([0.0, 0.0, math.log(3)]).double()
    merged = ((q @ k.mT) * 0.5 + bias).softmax(-1) @ v
    again = [0, 1, 2, 2, 2]
    copies = ((q @ k[:, :, again].mT) * 0.5).softmax(-1) @ v[:, :, again]
    torch.testing.assert_close(merged, copies)


def attended(n: int, prefix: int, class_token: bool, valid: Tensor | None = None) -> Attended:
    q, k, v = (draw(2, 3, prefix + n, 4, seed=s) for s in range(3))
    bias = None
    if valid is not None:
        bias = Tokens(draw(2, prefix + n, 1), prefix, valid=valid).key_bias(False)
    return Attended(q, k, v, 0.5, bias, prefix, class_token, valid)


@pytest.mark.parametrize("prefix, class_token", [(1, True), (3, True), (0, False), (2, False)])
@pytest.mark.parametrize("score", ["standardized", "jacobian"])
def test_rajni_reads_what_its_formulas_say(prefix, class_token, score):
    n = 6
    seen = attended(n, prefix, class_token)
    found = read(Tokens(draw(2, prefix + n, 12), prefix), seen, score)
    for i in range(2):
        heads = ((seen.q[i] @ seen.k[i].mT) * 0.5).softmax(-1)
        mean, value = heads.mean(0), seen.v[i].mean(0)
        norm = value.norm(dim=-1)
        if class_token:
            rho, row, rows = 1 + mean[0, 0] * norm[0], mean[0], heads[:, 0]
        else:
            own = [mean[prefix + j, prefix + j] * norm[prefix + j] for j in range(n)]
            rho, row, rows = 1 + sum(own) / n, mean[prefix:].mean(0), heads[:, prefix:].mean(1)
        if score == "jacobian":
            importance = [
                sum(rows[h, prefix + j] * seen.v[i, h, prefix + j].norm() for h in range(3))
                for j in range(n)
            ]
        else:
            u = value[prefix:] - value[prefix:].mean(0)
            length = u.norm(dim=-1)
            z = (length - length.mean()) / (length.std() + 1e-6)
            importance = [row[prefix + j] * max(0.0, float(z[j])) for j in range(n)]
        assert float(found.rho[i]) == pytest.approx(float(rho), abs=1e-12)
        assert found.importance[i].tolist() == pytest.approx([float(v) for v in importance])
        assert float(found.eta[i]) == pytest.approx(float(sum(importance)))


@pytest.mark.parametrize("prefix, class_token", [(1, True), (2, False)])
@pytest.mark.parametrize("score", ["standardized", "jacobian"])
def test_rajni_reads_padding_as_absent(prefix, class_token, score):
    n, real = 7, 5
    valid = torch.tensor([[True] * real + [False] * (n - real), [True] * n])
    seen = attended(n, prefix, class_token, valid)
    found = read(Tokens(draw(2, prefix + n, 12), prefix, valid=valid), seen, score)
    cut = [t[:1, :, : prefix + real] for t in (seen.q, seen.k, seen.v)]
    alone = read(
        Tokens(draw(1, prefix + real, 12), prefix),
        Attended(*cut, 0.5, None, prefix, class_token, None),
        score,
    )
    torch.testing.assert_close(found.rho[:1], alone.rho)
    torch.testing.assert_close(found.eta[:1], alone.eta)
    torch.testing.assert_close(found.importance[:1, :real], alone.importance)
    assert found.importance[0, real:].tolist() == [0.0] * (n - real)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ranking_orders_zeros_by_place_in_every_dtype(dtype):
    importance = torch.zeros(1, 1500, dtype=dtype)
    importance[0, 1200] = 0.5
    order = ranking(importance).argsort(descending=True)[0].tolist()
    assert order == [1200, *(i for i in range(1500) if i != 1200)]


def test_an_image_at_the_floor_is_left_alone_beside_one_above_it():
    """eta_prev too: 'a block with n <= min_tokens changes nothing'."""
    valid = torch.tensor([[True, True, False, False, False], [True] * 5])
    before = torch.tensor([7.0, 0.5]).double()
    tokens = Tokens(draw(2, 6, 12), 1, valid=valid, per_image={"eta": before})
    rule = RajniReduction("standardized", None, 2.0, 2, tuple(range(9)))
    after = rule.reduce(3, tokens, rule.observe(3, tokens, attended(5, 1, True, valid)))
    assert float(after.per_image["eta"][0]) == 7.0
    assert float(after.per_image["eta"][1]) != 0.5
    assert int(after.counts()[0]) == 3


def test_schedules():
    assert staged_counts(12, 196, (3, 6, 9), (0.75,) * 3, "m") == (
        *(196,) * 3, *(147,) * 3, *(110,) * 3, *(82,) * 3,
    )  # fmt: skip
    assert staged_counts(4, 10, (), (), "m") == (10,) * 4
    with refused(Code.EMPTY, where="m", block=1):
        staged_counts(4, 3, (0, 1), (0.5, 0.5), "m")
    with refused(Code.OUT_OF_RANGE, name="prune_layers", where="m", got=4, accepted=3):
        staged_counts(4, 9, (1, 4), (0.5, 0.5), "m")
    assert scale_layers(12, 0.25, 3, 0.25) == (3, 6, 9)
    assert scale_layers(24, 0.25, 3, 0.25) == (6, 12, 18)
    assert scale_layers(3, 0.75, 4, 1 / 12) == (2,)
    assert scale_layers(12, 0.0, 1, 0.0) == (0,)
