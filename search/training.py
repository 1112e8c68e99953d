"""Supervised training of a model: what training from scratch, fine-tuning and recovery share.

One loop over timm's optimisers and schedules. What is optimised is an *objective*, a function of
model, images and labels, so that distillation or token dropping needs no second loop. Nothing
here reads or writes files, and the caller seeds torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F


class Batches(Protocol):
    """One epoch's batches of images [B, 3, S, S] and targets (labels [B], or what the objective
    takes): a list, or a DataLoader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training came to: its index, mean objective and last learning rate."""

    index: int
    loss: float
    lr: float

    def __str__(self) -> str:
        return f"epoch {self.index}: loss {self.loss:.3f}, learning rate {self.lr:.2g}"


def cross_entropy(smoothing: float = 0.0) -> Objective:
    """The objective of plain supervised training: cross-entropy with label smoothing in [0, 1)."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"label smoothing must be in [0, 1) but got {smoothing}")

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

    return objective


def fit(
    model: nn.Module,
    batches: Callable[[int], Batches],
    *,
    epochs: int,
    lr: float,
    objective: Objective | None = None,
    optimizer: str = "adamw",
    weight_decay: float = 0.05,
    warmup_epochs: float = 0.0,
    clip_norm: float | None = 1.0,
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `model` in place and return one `Epoch` per epoch; the model is left in eval mode.

    `batches(epoch)` gives an epoch's batches, on the model's device. `objective(model, images,
    labels)` gives the scalar to minimise (default: `cross_entropy()`). The learning rate rises
    linearly over `warmup_epochs` to `lr`, then falls to 0 along a cosine; weight decay spares
    biases and norms (timm's rule); gradients are clipped to `clip_norm` where it is given.
    `progress` hears of every epoch when it ends.

    Raises ValueError for settings out of range or an epoch without batches, and
    FloatingPointError, naming epoch and step, when the objective is not finite.
    """
    if epochs < 1:
        raise ValueError(f"training needs at least 1 epoch but got {epochs}")
    if not lr > 0:
        raise ValueError(f"the learning rate must be positive but got {lr}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warm-up must be in [0, {epochs}) epochs but got {warmup_epochs}")
    minimise = objective if objective is not None else cross_entropy()
    updates = create_optimizer_v2(model, opt=optimizer, lr=lr, weight_decay=weight_decay)
    # timm's scheduler takes fractions of an epoch, so epochs may differ in their steps.
    warmup: Any = warmup_epochs  # annotated int there, but any number works
    schedule = CosineLRScheduler(updates, t_initial=epochs, warmup_t=warmup)
    history = []
    for epoch in range(epochs):
        model.train()
        steps = batches(epoch)
        if len(steps) == 0:
            raise ValueError(f"epoch {epoch} has no batches")
        total = 0.0
        for step, (images, labels) in enumerate(steps):
            # Half a step ahead: the first step's rate is not 0, the last one's neither.
            schedule.step(epoch + (step + 0.5) / len(steps))  # type: ignore[arg-type]
            loss = minimise(model, images, labels)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the training loss became {value} at epoch {epoch}, step {step}: "
                    f"try a learning rate below {lr:g}"
                )
            updates.zero_grad()
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            updates.step()
            total += value
        history.append(Epoch(epoch, total / len(steps), updates.param_groups[0]["lr"]))
        if progress is not None:
            progress(history[-1])
    model.eval()
    return history
