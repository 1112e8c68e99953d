"""Training of the embedded model: the same seed gives the same weights, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from vitpareto.search.models import embedded_model
from vitpareto.search.training import embedded
from vitpareto.search.training.loop import Epoch


def test_training_repeats_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # two steps of a shallower model: the same code in less time
    monkeypatch.setattr(embedded, "_BATCH", 300)
    monkeypatch.setattr(embedded_model, "DEPTH", 8)
    monkeypatch.setattr(embedded, "paint", functools.cache(embedded.paint))
    state = torch.get_rng_state()
    losses: list[Epoch] = []
    results = [
        embedded.train_embedded(tmp_path / f"{i}.safetensors", epochs=1, progress=losses.append)
        for i in range(2)
    ]
    assert results[0] == results[1] and losses[0] == losses[1]
    assert 0 <= results[0]["held-out_top1"] <= 100
    one, other = ((tmp_path / f"{i}.safetensors").read_bytes() for i in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), state)
