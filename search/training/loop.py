"""The training loop that training from scratch, fine-tuning and recovery share.

What is minimised is an objective, a function of model, images and labels, so that distillation or
token dropping needs no other loop. Nothing here reads or writes files, and the caller seeds torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from vitpareto.methods import BadInput, Code
from vitpareto.search.training.data_parallel import average_gradients, local_share
from vitpareto.search.training.optimizers import (
    CosineSchedule,
    Optimization,
    current_rate,
    make_average,
    make_optimizer,
    out_of_range,
)


class Batches(Protocol):
    """One epoch's batches of images [B, 3, S, S] and targets (labels [B], or what the objective
    takes): a list, or a DataLoader."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: its index, the mean objective, and the last learning rate."""

    index: int
    loss: float
    lr: float

    def __str__(self) -> str:
        return f"epoch {self.index}: loss {self.loss:.3f}, learning rate {self.lr:.2g}"


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next epoch depends on. The schedule's position is `len(history)`.

    Attributes:
        model, optimizer, average: state dicts (average: of the weights' moving average, None
            without one). They are shared with the running training: copy them to keep them.
        random: states of torch's generators, by device.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None
    random: dict[str, Tensor]
    history: tuple[Epoch, ...]


class LossNotFinite(FloatingPointError):
    """The training loss became infinite or not a number."""

    def __init__(self, loss: float, epoch: int, step: int, lr: float) -> None:
        super().__init__(
            f"the training loss became {loss} at epoch {epoch}, step {step}: "
            f"try a learning rate below {lr:g}"
        )
        self.loss, self.epoch, self.step, self.lr = loss, epoch, step, lr

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.loss, self.epoch, self.step, self.lr)


def cross_entropy(smoothing: float = 0.0) -> Objective:
    """The objective of plain supervised training: cross-entropy with label smoothing in [0, 1)."""
    if not 0 <= smoothing < 1:
        raise out_of_range("smoothing", "in [0, 1)", smoothing)

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)

    return objective


def fit(
    model: nn.Module,
    batches: Callable[[int], Batches],
    how: Optimization,
    *,
    objective: Objective | None = None,
    state: TrainingState | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `model` in place; returns one `Epoch` per epoch. The model is left in eval mode.

    Args:
        batches: called with the epoch; returns its batches, on the model's device.
        how: epochs, optimizer and schedule.
        objective: called with model, images and labels; returns the scalar to minimise. Default:
            `cross_entropy()`.
        state: state of an earlier training with the same settings to continue from. On a CPU the
            weights are the same as without the interruption, bit for bit.
        on_state: called with the state after every epoch, before `progress`.
        progress: called with every finished epoch.

    Raises BadInput for a state that does not fit or an epoch without batches, LossNotFinite if the
    objective is not finite.
    """
    updates = make_optimizer(model, how)
    schedule = CosineSchedule(updates, how.epochs, how.warmup_epochs)
    ema = make_average(model, how.average)
    history: list[Epoch] = []
    if state is not None:
        if len(state.history) > how.epochs:
            least = f"at least the {len(state.history)} finished"
            raise out_of_range("epochs", least, how.epochs)
        _restore(state, model, updates, ema)
        history += state.history
    loop = _Loop(model, updates, schedule, ema, objective or cross_entropy(), how)
    for epoch in range(len(history), how.epochs):
        history.append(loop.run_epoch(epoch, batches(epoch)))
        if on_state is not None:
            on_state(_state(model, updates, ema, history))
        if progress is not None:
            progress(history[-1])
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    model.eval()
    return history


@dataclass(frozen=True)
class _Loop:
    """The parts of a running training."""

    model: nn.Module
    updates: Optimizer
    schedule: CosineSchedule
    ema: ModelEmaV3 | None
    objective: Objective
    how: Optimization

    def run_epoch(self, epoch: int, batches: Batches) -> Epoch:
        """One pass over the batches. Raises BadInput if there are none."""
        steps = len(batches)
        if steps == 0:
            raise BadInput(f"epoch {epoch} has no batches", Code.EMPTY, epoch=epoch)
        self.model.train()
        total = 0.0
        for step, (images, labels) in enumerate(batches):
            self.schedule.set_rate(epoch, step, steps)
            total += self._step(epoch, step, images, labels)
            if self.ema is not None:
                self.ema.update(self.model, step=epoch * steps + step + 2)
        return Epoch(epoch, total / steps, current_rate(self.updates))

    def _step(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> float:
        """One update; returns the loss of the whole batch."""
        images, labels, share = local_share(images, labels)
        with _casting(next(self.model.parameters()).device.type, self.how.autocast):
            loss = self.objective(self.model, images, labels)
        self.updates.zero_grad()
        loss.backward()
        value = average_gradients(self.model, loss.item(), share)
        if not math.isfinite(value):
            raise LossNotFinite(value, epoch, step, self.how.lr)
        if self.how.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.how.clip_norm)
        self.updates.step()
        return value


def _casting(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _state(
    model: nn.Module, updates: Optimizer, ema: ModelEmaV3 | None, history: list[Epoch]
) -> TrainingState:
    average = None if ema is None else ema.module.state_dict()
    # dropout, drop path, noise and masks draw from torch's generators
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        random["cuda"] = torch.cuda.get_rng_state()
    return TrainingState(model.state_dict(), updates.state_dict(), average, random, tuple(history))


def _restore(
    state: TrainingState, model: nn.Module, updates: Optimizer, ema: ModelEmaV3 | None
) -> None:
    """Set model, optimizer, average and generators to the state."""
    if (ema is None) != (state.average is None):
        raise BadInput(
            "checkpoint and training must both average the weights, or neither",
            Code.MISMATCH,
            name="average",
        )
    model.load_state_dict(state.model)
    updates.load_state_dict(state.optimizer)
    if ema is not None and state.average is not None:
        ema.module.load_state_dict(state.average)
    torch.set_rng_state(state.random["cpu"])
    if "cuda" in state.random and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.random["cuda"])
