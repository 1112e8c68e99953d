"""Gradients of pruned models, with and without gradient checkpointing."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from tests.methods.method_settings import COVERING, FIRST, PAIRS, Case, pairs, pruned
from tests.methods.tiny_models import dense, images
from vitpareto.methods.engine import forward


@cache
def reached(kind: str) -> set[str]:
    """The dense model's parameters that get a gradient."""
    model = copy.deepcopy(dense(kind)).train()
    model(images(model, 2)).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pairs(PAIRS, fast=COVERING)
def test_gradients_and_checkpointing(kind, case: Case):
    """Gradients reach what they reach in the dense model. Gradient checkpointing, which computes
    each block's activations and random draws a second time, gives the same ones.
    """
    reduced = copy.deepcopy(pruned(kind, case)).train()
    for module in reduced.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    entered: list[int] = []
    reduced.blocks[1].norm1.register_forward_pre_hook(lambda *_: entered.append(1))
    plain, checkpointed = gradients(reduced, kind, False), gradients(reduced, kind, True)
    assert len(entered) == 1 + 2

    own = {n: grad for n, grad in plain.items() if not n.startswith("reduction.")}
    assert {name for name, grad in own.items() if grad is not None} == reached(kind)
    for name in reached(kind):
        assert own[name].isfinite().all(), name
        assert own[name].abs().max() > 0, name

    for name, grad in checkpointed.items():
        assert (plain[name] is None) == (grad is None), name
        assert grad is None or torch.equal(plain[name], grad), name


def gradients(reduced: nn.Module, kind: str, checkpointing: bool) -> dict[str, Tensor | None]:
    reduced.set_grad_checkpointing(checkpointing)
    reduced.zero_grad()
    torch.manual_seed(5)
    reduced(images(dense(kind), 2)).square().sum().backward()
    return {name: p.grad for name, p in reduced.named_parameters()}


def test_checkpointing_restores_the_devices_random_state(monkeypatch):
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
