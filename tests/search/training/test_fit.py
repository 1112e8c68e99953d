"""The training loop's basic behaviour on a linear model."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from tests.refusals import refused
from vitpareto.search.training.loop import LossNotFinite, cross_entropy, fit
from vitpareto.search.training.optimizers import Optimization


def test_fit_refuses_what_cannot_be_trained() -> None:
    net = nn.Linear(2, 2)
    batch = (torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
    with refused("out-of-range", name="epochs", got=0):
        fit(net, lambda _: [batch], Optimization(epochs=0, lr=1.0))
    with refused("out-of-range", name="lr", got=0.0):
        fit(net, lambda _: [batch], Optimization(epochs=1, lr=0.0))
    with refused("empty", epoch=0):
        fit(net, lambda _: [], Optimization(epochs=1, lr=1.0))
    with refused("out-of-range", name="smoothing", got=1.0):
        cross_entropy(1.0)
    broken = (torch.full((4, 2), torch.nan), batch[1])
    with pytest.raises(LossNotFinite) as caught:
        fit(net, lambda epoch: [batch, broken if epoch else batch], Optimization(2, lr=0.1))
    error = pickle.loads(pickle.dumps(caught.value))  # it crosses processes
    assert isinstance(error, FloatingPointError) and math.isnan(error.loss)
    assert (error.epoch, error.step, error.lr) == (1, 1, 0.1)


def test_fit_lowers_the_loss_along_its_schedule() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 2)
    labels = (images[:, 0] > 0).long()
    net = nn.Linear(2, 2)
    how = Optimization(epochs=10, lr=0.1, warmup_epochs=2)
    history = fit(net, lambda _: [(images, labels)] * 4, how)
    assert history[-1].loss < history[0].loss / 2
    rates = [epoch.lr for epoch in history]
    assert rates[0] < max(rates) and rates[-1] < 0.01 * max(rates)
    assert not net.training
