"""Gradient training of a model: what training from scratch, fine-tuning and recovery share.

One loop over timm's optimisers and schedules. What is optimised is an *objective*, a function of
model, images and labels, so that distillation or token dropping needs no second loop. Nothing
here reads or writes files, and the caller seeds torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from vitpareto.search.training.data_parallel import own_share, whole_batch


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


@dataclass(frozen=True)
class State:
    """Training as it stands after whole epochs: all that the next one depends on.

    model, optimizer and average (of the weights; None without one) are state dicts, shared with
    the training that goes on: keep a copy. random: the generators' states by device. The
    schedule's position is `len(history)`, the epochs done.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] | None
    random: dict[str, Tensor]
    history: tuple[Epoch, ...]


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
    layer_decay: float | None = None,
    parts_scale: float = 1.0,
    average: float | None = None,
    autocast: torch.dtype | None = None,
    state: State | None = None,
    keep: Callable[[State], None] | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `model` in place and return one `Epoch` per epoch; the model is left in eval mode.

    `batches(epoch)` gives an epoch's batches, on the model's device. `objective(model, images,
    labels)` gives the scalar to minimise (default: `cross_entropy()`), under autocast to the dtype
    `autocast` where that is given. The learning rate rises linearly over `warmup_epochs` to `lr`,
    then falls to 0 along a cosine; weight decay spares biases and norms (timm's rule); block by
    block towards the input the rate is multiplied by `layer_decay`, and that of what a method adds
    (`reduction.*`, fresh beside a trained model) by `parts_scale`; gradients are clipped to
    `clip_norm`. With `average` the model ends with the moving average of its weights at that decay
    a step (warmed up as timm does). `progress` hears of every epoch when it ends.

    `keep` is given the state after every epoch, before `progress` hears. `state`: one of those,
    from a training with the same settings, to go on from; on a CPU the weights come out as they
    would have without the interruption, to the bit.

    Raises ValueError for settings out of range or an epoch without batches, and
    FloatingPointError, naming epoch and step, when the objective is not finite.
    """
    if epochs < 1:
        raise ValueError(f"training needs at least 1 epoch but got {epochs}")
    if not lr > 0:
        raise ValueError(f"the learning rate must be positive but got {lr}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warm-up must be in [0, {epochs}) epochs but got {warmup_epochs}")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"the layer decay must be in (0, 1] but got {layer_decay}")
    if not parts_scale > 0:
        raise ValueError(f"the scale of the parts' rate must be positive but got {parts_scale}")
    if average is not None and not 0 < average < 1:
        raise ValueError(f"the average's decay must be in (0, 1) but got {average}")
    if state is not None and len(state.history) > epochs:
        raise ValueError(f"{len(state.history)} epochs are done already: {epochs} are fewer")
    minimise = objective if objective is not None else cross_entropy()
    updates = create_optimizer_v2(
        model,
        opt=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        param_group_fn=_apart(weight_decay, layer_decay, parts_scale) if parts_scale != 1 else None,
    )
    # timm's scheduler takes fractions, so epochs may differ in their steps; halves of an epoch are
    # its unit here, since it warns of a period of 1.
    warmup: Any = 2 * warmup_epochs  # annotated int there, but any number works
    schedule = CosineLRScheduler(updates, t_initial=2 * epochs, warmup_t=warmup)
    ema = None if average is None else ModelEmaV3(model, decay=average, use_warmup=True)
    history: list[Epoch] = []
    if state is not None:
        _go_on(state, model, updates, ema)
        history += state.history
    device = next(model.parameters()).device.type
    for epoch in range(len(history), epochs):
        model.train()
        steps = batches(epoch)
        if len(steps) == 0:
            raise ValueError(f"epoch {epoch} has no batches")
        total = 0.0
        for step, (images, labels) in enumerate(steps):
            images, labels, share = own_share(images, labels)
            # Half a step ahead: the first step's rate is not 0, the last one's neither.
            schedule.step(2 * (epoch + (step + 0.5) / len(steps)))  # type: ignore[arg-type]
            with _casting(device, autocast):
                loss = minimise(model, images, labels)
            updates.zero_grad()
            loss.backward()
            value = whole_batch(model, loss.item(), share)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the training loss became {value} at epoch {epoch}, step {step}: "
                    f"try a learning rate below {lr:g}"
                )
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            updates.step()
            if ema is not None:
                ema.update(model, step=epoch * len(steps) + step + 2)
            total += value
        group = updates.param_groups[0]
        rate = group["lr"] / group.get("lr_scale", 1.0)
        history.append(Epoch(epoch, total / len(steps), rate))
        if keep is not None:
            smooth = None if ema is None else ema.module.state_dict()
            keep(State(
                model.state_dict(), updates.state_dict(), smooth, _random_states(), tuple(history)
            ))  # fmt: skip
        if progress is not None:
            progress(history[-1])
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    model.eval()
    return history


def _apart(
    weight_decay: float, layer_decay: float | None, scale: float
) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """timm's parameter groups, those of `reduction.*` in groups of their own at `scale`."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        named: set[str] = getattr(model, "no_weight_decay", set)()
        if layer_decay is None:
            found = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=named)
        else:
            found = param_groups_layer_decay(
                model, weight_decay, no_weight_decay_list=named, layer_decay=layer_decay
            )
        parts = {id(p) for n, p in model.named_parameters() if n.startswith("reduction.")}
        out = []
        for group in found:
            own = [p for p in group["params"] if id(p) in parts]
            rest = [p for p in group["params"] if id(p) not in parts]
            part = {**group, "params": own, "lr_scale": group.get("lr_scale", 1.0) * scale}
            out += [g for g in ({**group, "params": rest}, part) if g["params"]]
        return out

    return groups


def _casting(device: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


def _random_states() -> dict[str, Tensor]:
    """torch's generators, which dropout, drop path, noise and masks draw from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _go_on(
    state: State, model: nn.Module, updates: torch.optim.Optimizer, ema: ModelEmaV3 | None
) -> None:
    """Put model, optimiser, average and generators where `state` says."""
    if (ema is None) != (state.average is None):
        raise ValueError("the state to go on from is of another training: one averages the weights")
    model.load_state_dict(state.model)
    updates.load_state_dict(state.optimizer)
    if ema is not None and state.average is not None:
        ema.module.load_state_dict(state.average)
    torch.set_rng_state(state.random["cpu"])
    if "cuda" in state.random and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.random["cuda"])
