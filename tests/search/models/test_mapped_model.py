"""Mapped models: equal logits, one file for all loads, private writes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from tests.search.small import images, vit
from vitpareto.search.models.loading import (
    fingerprint,
)
from vitpareto.search.models.mapped_model import MappedModel

#: timm's smallest entry point of the supported family, 5.7 M parameters
NAME = "deit_tiny_patch16_224"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(2)
    return timm.create_model(NAME, num_classes=7).eval()


def test_a_mapped_model_has_the_same_logits_and_pickles_small(
    tmp_path: Path, model: nn.Module
) -> None:
    given = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(given)
    mapped = MappedModel.save(model, tmp_path / "model.safetensors")
    travelling = pickle.dumps(mapped)
    assert len(travelling) < 200_000 < 0.01 * (tmp_path / "model.safetensors").stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = pickle.loads(travelling).load("cpu", torch.float32)
    assert not loaded.training and type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(given), expected)
        assert torch.equal(model(given), expected), "the model that was saved stays whole"
    assert not any(p.is_meta for p in loaded.parameters())
    assert all(
        a.requires_grad == b.requires_grad
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert fingerprint(loaded) == fingerprint(model)


def mappings(path: Path) -> list[tuple[int, int]]:
    """Address ranges of this process that are pages of the file."""
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0] for line in maps if line.rstrip().endswith(str(path))]
    return [(int(a, 16), int(b, 16)) for a, b in (span.split("-") for span in spans)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_every_load_maps_the_same_file(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "model.safetensors"
    mapped = MappedModel.save(model, path)
    two = [mapped.load("cpu", torch.float32) for _ in range(2)]
    spans = mappings(path)
    for one in two:
        for name, p in one.named_parameters():
            assert any(a <= p.data_ptr() < b for a, b in spans), f"{name} was copied"
    assert not any(
        a <= p.data_ptr() < b for p in mapped.load("cpu", torch.bfloat16).parameters()
        for a, b in spans
    )  # fmt: skip
    before = two[1].state_dict()["head.bias"].clone()
    with torch.no_grad():
        two[0].get_parameter("head.bias").add_(1)
    assert torch.equal(two[1].state_dict()["head.bias"], before), "writing is private"
    assert torch.equal(safetensors.torch.load_file(path)["head.bias"], before)


def test_a_mapped_model_has_the_requested_dtype(tmp_path: Path) -> None:
    mapped = MappedModel.save(vit(), tmp_path / "model.safetensors")
    loaded = mapped.load("cpu", torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert loaded(images(2).bfloat16()).shape == (2, 10)
