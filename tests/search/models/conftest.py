"""Fixtures of this package: the embedded model, and random images for it and for larger models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitpareto.search.models import embedded_model


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return embedded_model.build()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def wide_images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
