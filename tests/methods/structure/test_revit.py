"""ReViT: the published table, its parameter counts to the unit, and fresh weights."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from tests.methods.tiny_models import dense
from vitpareto import methods
from vitpareto.methods.slicing.sliced_model import BlockWidths, model_widths, sliced_model
from vitpareto.methods.structure.revit import redistributed


def small():
    """By its rule: E = 384, small = round(1.92) = 2, wide = round(2.4) = 2."""
    edge, outer = BlockWidths(10, 32, 64, 1152), BlockWidths(4, 16, 64, 1152)
    middle = BlockWidths(8, 32, 64, 2304)
    return (edge, *[outer] * 2, *[middle] * 6, *[outer] * 2, edge)


def test_the_table():
    assert redistributed(384).blocks == small()
    tiny = redistributed(176).blocks
    assert tiny[0] == tiny[11] == BlockWidths(10, 16, 64, 528)
    assert {tiny[b] for b in (1, 2, 9, 10)} == {BlockWidths(2, 8, 64, 528)}
    assert {tiny[b] for b in range(3, 9)} == {BlockWidths(4, 16, 64, 1056)}


def parameters(widths, classes=1000, tokens=197):
    """Counted by hand, for 16 x 16 patches with a class token."""
    e = widths.embedding
    total = (3 * 256 + 1) * e + e + tokens * e + 2 * e + (e + 1) * classes
    for b in widths.blocks:
        total += b.heads * (2 * b.qk + b.v) * (e + 1) + (b.heads * b.v + 1) * e
        total += (e + 1) * b.mlp + (b.mlp + 1) * e + 4 * e
    return total


@pytest.mark.parametrize("embedding, count", [(176, 5_161_784), (384, 22_737_512)])
def test_parameters_are_the_published_ones(embedding, count):
    """5.16 M and 22.74 M."""
    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224", pretrained=False)
    with pytest.warns(methods.Untrained):
        built = methods.prune(model, "revit", embedding=embedding)
    assert (
        sum(p.numel() for p in built.parameters()) == count == parameters(redistributed(embedding))
    )


def test_presets_and_choices():
    declared, shape = methods.get("revit"), methods.model_shape(dense("class"))
    assert [declared.preset(p, shape) for p in declared.presets] == [
        {"embedding": 176}, {"embedding": 384},
    ]  # fmt: skip
    assert declared.resolve({"width": 0.5}, shape) == {"embedding": 16}
    assert declared.resolve({"width": 0.8}, shape) == {"embedding": 32}
    assert declared.resolve({"width": 0.25}, shape) == {"embedding": 16}


@pytest.mark.parametrize("depth, places", [(4, (0, 4, 7, 11)), (24, None), (1, (0,)), (2, (0, 11))])
def test_another_depth_has_blocks_as_the_twelve(depth, places):
    blocks, twelve = redistributed(384, depth).blocks, redistributed(384).blocks
    assert len(blocks) == depth
    assert blocks[0] == twelve[0]
    assert blocks == blocks[::-1]
    assert {b.mlp for b in blocks} <= {1152, 2304}
    if places is not None:
        assert blocks == tuple(twelve[p] for p in places)


def built(seed=0):
    torch.manual_seed(seed)
    with pytest.warns(methods.Untrained):
        return methods.prune(dense("layer_scale"), "revit", embedding=48)


def test_its_weights_are_fresh():
    """timm's initialisation, drawn anew: nothing of the model that was given."""
    model, first = copy.deepcopy(dense("layer_scale").state_dict()), built().state_dict()
    again, other = built().state_dict(), built(1).state_dict()
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if name.endswith(".attn.widths"):
            continue
        if value.dim() > 1 or "token" in name:
            assert not torch.equal(value, other[name])
            assert value.shape != model[name].shape or not torch.equal(value, model[name])
        elif "norm" in name and name.endswith("weight"):
            assert (value == 1).all()
        elif name.endswith("gamma"):
            assert (value == 0.5).all()
        elif "patch_embed" not in name:
            assert (value == 0).all()
    assert first["blocks.1.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_a_fixed_table_of_positions_stays_where_the_width_does():
    model = dense("simple")
    with pytest.warns(methods.Untrained):
        same = methods.prune(model, "revit", embedding=32)
    assert torch.equal(same.pos_embed, model.pos_embed)
    assert not same.pos_embed.requires_grad


def test_it_loads_its_own_weights():
    once, batch = built(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    state = once.state_dict()
    digest = methods.weights_digest(state)
    text = f"{{structure: {{method: revit, embedding: 48}}, weights: '{digest}'}}"
    again = methods.Recipe.from_yaml(text).build(dense("layer_scale"), weights=state)
    with torch.no_grad():
        assert torch.equal(again(batch), once(batch))
    assert model_widths(again) == redistributed(48, 3)


def test_wider_than_the_model_is_no_error():
    wide = sliced_model(dense("class"), redistributed(200, 4))
    assert model_widths(wide).blocks[0] == BlockWidths(10, 16, 64, 600)
