"""Fingerprints of models: equal for equal models, different if they compute something else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitpareto.search.models.loading import (
    fingerprint,
)


def small(**settings: Any) -> VisionTransformer:
    torch.manual_seed(3)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**shape, "num_classes": 5, **settings})


def test_equal_weights_have_equal_fingerprints() -> None:
    one = fingerprint(small())
    assert one == fingerprint(small()) == fingerprint(small().eval())
    assert len(one) == 16 and int(one, 16) >= 0


def test_any_change_of_a_weight_changes_the_fingerprint() -> None:
    changed = small()
    with torch.no_grad():
        changed.get_parameter("blocks.1.mlp.fc2.bias")[3] += 1e-7
    assert fingerprint(changed) != fingerprint(small())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 4},
        {"act_layer": nn.ReLU},
        {"norm_layer": functools.partial(LayerNorm, eps=1e-3)},
        {"global_pool": "avg", "fc_norm": False},
    ],
    ids=["heads", "activation", "epsilon", "pooling"],
)
def test_the_fingerprint_covers_what_a_forward_pass_computes(
    settings: dict[str, Any],
) -> None:
    other = small(**settings)
    other.load_state_dict(small().state_dict())
    assert fingerprint(other) != fingerprint(small())


def test_the_fingerprint_covers_buffers_of_every_kind() -> None:
    """Scalars and whole numbers among them."""
    one, two = small(), small()
    for model, count in ((one, 0), (two, 1)):
        model.register_buffer("steps", torch.tensor(count))
    assert fingerprint(one) != fingerprint(two)
