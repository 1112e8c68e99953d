"""Sliced models: exactly the dense ones with what is gone set to zero, and readable from a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.methods.tiny_models import MODELS, dense, images
from tests.refusals import refused
from vitpareto import methods
from vitpareto.methods import Code
from vitpareto.methods.engine.sliced_block import fused_attention
from vitpareto.methods.slicing.sliced_model import (
    BlockKept,
    BlockWidths,
    Kept,
    SlicedAttention,
    Widths,
    fixed,
    model_widths,
    slice_model,
    sliced_model,
    widths_of,
)

PARTS = ("heads", "qk", "v", "mlp", "embedding")


def logits(model, batch):
    with torch.no_grad():
        return model(batch)


def picked(width, count, draw):
    return torch.randperm(width, generator=draw)[:count].sort().values


def kept(model, parts, seed=3):
    """A random share of these dimensions, other channels in every head; all of the others."""
    draw, own = torch.Generator().manual_seed(seed), model_widths(model)

    def some(part, width):
        count = max(1, int(width * (0.4 + 0.5 * torch.rand(1, generator=draw).item())))
        return count if part in parts else width

    blocks = []
    for b in own.blocks:
        heads = picked(b.heads, some("heads", b.heads), draw)
        qk, v = some("qk", b.qk), some("v", b.v)
        blocks.append(
            BlockKept(
                heads,
                torch.stack([picked(b.qk, qk, draw) for _ in heads]),
                torch.stack([picked(b.v, v, draw) for _ in heads]),
                picked(b.mlp, some("mlp", b.mlp), draw),
            )
        )
    return Kept(picked(own.embedding, some("embedding", own.embedding), draw), tuple(blocks))


class KeptNorm(nn.Module):
    """A norm whose statistics are over the kept channels; 0 in the others."""

    def __init__(self, norm, index):
        super().__init__()
        self.norm, self.index = copy.deepcopy(norm), index
        for name, p in list(self.norm.named_parameters()):
            setattr(self.norm, name, nn.Parameter(p.detach()[index]))
        self.norm.normalized_shape = (len(index),)

    def forward(self, x):
        return torch.zeros_like(x).index_copy(-1, self.index, self.norm(x[..., self.index]))


def gone(width, index):
    mask = torch.ones(width, dtype=torch.bool)
    mask[index] = False
    return mask


def zeroed(model, what):
    """The second implementation: a dense model that has zeros for everything not kept."""
    model, own = copy.deepcopy(model), model_widths(model)
    e = gone(own.embedding, what.embedding)
    with torch.no_grad():
        for index, (block, b, left) in enumerate(
            zip(model.blocks, own.blocks, what.blocks, strict=True)
        ):
            qk, v = torch.ones(b.heads, b.qk).bool(), torch.ones(b.heads, b.v).bool()
            for i, head in enumerate(left.heads):
                qk[head, left.qk[i]] = False
                v[head, left.v[i]] = False
            rows = torch.cat([qk.flatten(), qk.flatten(), v.flatten()])
            hidden = gone(b.mlp, left.mlp)
            into = [getattr(block.mlp, n, None) for n in ("fc1", "fc1_g", "fc1_x")]
            for layer, mask in [(block.attn.qkv, rows), *((layer, hidden) for layer in into)]:
                if layer is not None:
                    layer.weight[mask] = 0
                    if layer.bias is not None:
                        layer.bias[mask] = 0
            # what a block adds to the channels that are gone
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[e] = 0
                layer.bias[e] = 0
            if e.any():
                model.blocks[index].norm1 = KeptNorm(block.norm1, what.embedding)
                model.blocks[index].norm2 = KeptNorm(block.norm2, what.embedding)
        if e.any():
            model.patch_embed.proj.weight[e] = 0
            if model.patch_embed.proj.bias is not None:
                model.patch_embed.proj.bias[e] = 0
            for name in ("cls_token", "reg_token", "dist_token", "pos_embed"):
                if getattr(model, name, None) is not None:
                    getattr(model, name)[..., e] = 0
            for name in ("norm", "norm_pre", "fc_norm"):
                if not isinstance(getattr(model, name), nn.Identity):
                    setattr(model, name, KeptNorm(getattr(model, name), what.embedding))
    return model


#: attention without q/k-norm, and an MLP that a cut leaves exact
CUTS = [
    (kind, part)
    for kind in MODELS
    for part in (*PARTS, "all")
    if part == "all" or part not in fixed(dense(kind))
]


@pytest.mark.parametrize("kind, part", CUTS)
def test_slicing_is_the_dense_model_with_zeros(kind, part):
    model = dense(kind)
    parts = set(PARTS if part == "all" else [part]) - set(fixed(model))
    what = kept(model, parts)
    small, batch = slice_model(model, what), images(model)
    assert model_widths(small) == what.widths == widths_of(small.state_dict())
    expected = logits(zeroed(model, what), batch)
    torch.testing.assert_close(logits(small, batch), expected, rtol=0, atol=1e-12)
    # timm's own forward is the reduced one's, too
    said = logits(methods.prune(small, "dense"), batch)
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-12)
    if part != "heads" or any(b.heads > 1 for b in model_widths(model).blocks):
        assert sum(p.numel() for p in small.parameters()) < sum(
            p.numel() for p in model.parameters()
        )


@pytest.mark.parametrize("kind", ["distilled", "layer_scale", "sliced"])
def test_slicing_in_float32(kind):
    model = dense(kind, torch.float32)
    what, batch = kept(model, set(PARTS)), images(model)
    said, expected = logits(slice_model(model, what), batch), logits(zeroed(model, what), batch)
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)


def test_keeping_everything_is_the_model():
    model, batch = dense("class"), images(dense("class"))
    assert torch.equal(logits(slice_model(model, kept(model, ())), batch), logits(model, batch))


def test_the_parameters_are_those_of_the_closed_form():
    model = dense("class")
    what = kept(model, set(PARTS))
    e, w = what.widths.embedding, what.widths
    blocks = sum(
        b.heads * (2 * b.qk + b.v) * (e + 1) + (b.heads * b.v + 1) * e
        + b.mlp * (e + 1) + (b.mlp + 1) * e + 4 * e
        for b in w.blocks
    )  # fmt: skip
    around = e * (3 * 8 * 8 + 1) + e + 17 * e + 2 * e + (e + 1) * 7
    assert sum(p.numel() for p in slice_model(model, what).parameters()) == blocks + around


def test_slicing_a_slice():
    """Cut twice is cut once."""
    model, batch = dense("class"), images(dense("class"))
    first = kept(model, {"qk", "mlp"})
    twice = kept(slice_model(model, first), {"qk", "mlp"}, seed=4)
    blocks = [
        BlockKept(a.heads, a.qk.gather(1, b.qk), a.v, a.mlp[b.mlp])
        for a, b in zip(first.blocks, twice.blocks, strict=True)
    ]
    once = slice_model(model, Kept(first.embedding, tuple(blocks)))
    both = slice_model(slice_model(model, first), twice)
    torch.testing.assert_close(logits(both, batch), logits(once, batch), rtol=0, atol=1e-12)


INEXACT = {
    "qk_norm": {"qk"},
    "scale_norm": {"heads", "v", "mlp"},
    "map": {"embedding"},
    "map_class": {"embedding"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_cuts_that_are_not_exact_are_refused(kind):
    model = dense(kind)
    assert set(fixed(model)) == INEXACT.get(kind, set())
    for part in INEXACT.get(kind, set()):
        with refused(Code.UNSUPPORTED, methods.UnsupportedModel, part=part):
            slice_model(model, kept(model, {part}))


def test_other_mlps_are_refused():
    from timm.layers.mlp import GluMlp

    model = MODELS["class"]()
    model.blocks[2].mlp = GluMlp(32, 64)
    assert set(fixed(model)) == {"mlp", "embedding"}
    with refused(Code.UNSUPPORTED, methods.UnsupportedModel) as caught:
        sliced_model(model, Widths(16, model_widths(model).blocks))
    assert "block 2" in caught.value.details["reason"]
    assert "GluMlp" in caught.value.details["reason"]
    # and its attention can still be cut
    small = slice_model(model, kept(model, {"v"}))
    assert type(small.blocks[2].mlp) is GluMlp


def test_the_widths_are_read_back_from_the_file():
    model = dense("distilled")
    small = slice_model(model, kept(model, set(PARTS)))
    state = methods.prune(small, "topk", keep_rate=0.5).state_dict()
    again = sliced_model(model, widths_of(state))
    again.load_state_dict(state)
    batch = images(model)
    assert torch.equal(logits(again, batch), logits(small, batch))


def test_weights_of_no_sliced_model():
    for state in (dense("class").state_dict(), {}):
        with refused(Code.MISMATCH, name="weights", missing="blocks.0.attn.widths"):
            widths_of(state)
    state = dense("sliced").state_dict()
    state["blocks.1.attn.widths"] = torch.tensor([4, 4, 12])
    with refused(Code.MISMATCH, key="blocks.1.attn.widths", got=[4, 4, 12]):
        widths_of(state)
    del state["blocks.2.mlp.fc2.weight"]
    state["blocks.1.attn.widths"] = torch.tensor([2, 16, 8])
    with refused(Code.MISMATCH, name="weights", missing="blocks.2.mlp.fc2.weight"):
        widths_of(state)


def test_equal_shapes_are_not_equal_widths():
    """2 heads of 16 and 4 of 8: the weights would load with another meaning."""
    model = dense("class")
    four = Widths(32, (BlockWidths(4, 8, 8, 128),) * 4)
    state = slice_model(model, kept(model, ())).state_dict()
    other = sliced_model(model, four)
    with pytest.raises(RuntimeError):
        other.load_state_dict(state)
    with refused(Code.MISMATCH) as caught:
        methods.prune(other, "topk", keep_rate=0.5, weights=state)
    assert "[2, 16, 16]" in caught.value.details["reason"]


def test_building_leaves_model_and_generator_alone():
    model = copy.deepcopy(dense("registers"))
    before, torch_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    wide = sliced_model(model, Widths(200, (BlockWidths(5, 24, 40, 7),) * 4))
    assert model_widths(wide).blocks[3] == BlockWidths(5, 24, 40, 7)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with refused(Code.MISMATCH, name="widths", got=3, expected=4):
        sliced_model(model, Widths(32, (BlockWidths(2, 8, 8, 16),) * 3))


def test_what_does_not_train_stays_so():
    model = copy.deepcopy(dense("simple"))
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    small = slice_model(model, kept(model, set(PARTS)))
    held = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert held == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"pos_embed", "blocks.0.attn.qkv.weight"} <= held


def attention(kind="class"):
    model = dense(kind)
    attn = copy.deepcopy(slice_model(model, kept(model, ())).blocks[0].attn)
    assert type(attn) is SlicedAttention
    return model.blocks[0].attn, attn


def boolean(n):
    return torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(0)) > 0.3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "asked",
    [{}, {"is_causal": True}, {"attn_mask": boolean(9)}, {"attn_mask": boolean(9).double() * -3}],
    ids=["plain", "causal", "boolean", "bias"],
)
@pytest.mark.parametrize("kind", ["class", "gated", "qk_norm", "scale_norm"])
def test_its_attention_is_timms_where_widths_are_equal(kind, asked, fused):
    theirs, ours = attention(kind)
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if "attn_mask" in asked and asked["attn_mask"].dtype is torch.bool:
        asked = {"attn_mask": asked["attn_mask"] | torch.eye(9).bool()}
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    theirs.fused_attn = ours.fused_attn = fused
    with torch.no_grad():
        torch.testing.assert_close(ours(x, **asked), theirs(x, **asked), rtol=0, atol=1e-13)


@pytest.mark.parametrize("qk, v", [(8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize("masked", [True, False])
def test_filling_up_changes_nothing(qk, v, masked):
    draw = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 3, 7, qk, dtype=torch.float64, generator=draw) for _ in range(2))
    values = torch.randn(2, 3, 7, v, dtype=torch.float64, generator=draw)
    mask = torch.randn(2, 1, 1, 7, dtype=torch.float64, generator=draw) if masked else None
    rows = (q @ k.mT * qk**-0.5 + (0 if mask is None else mask)).softmax(dim=-1)
    said = fused_attention(q, k, values, mask, 0.0)
    torch.testing.assert_close(said, rows @ values, rtol=0, atol=1e-13)


def test_widths_as_plain_data():
    own = model_widths(dense("sliced"))
    plain = own.to_plain()
    assert plain["blocks"][1] == [2, 16, 8, 80]
    assert Widths.from_plain(plain) == own
