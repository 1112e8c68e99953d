"""Optimizer, learning-rate schedule and weight average of a training, on timm's implementations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from vitpareto.methods import BadInput, Code


@dataclass(frozen=True)
class Optimization:
    """How `loop.fit` updates the weights. Raises BadInput for values out of range.

    Attributes:
        epochs: number of epochs in all, those of an earlier state included.
        lr: the highest learning rate. It rises linearly over `warmup_epochs`, then falls to 0 along
            a cosine.
        optimizer: timm's name.
        weight_decay: not applied to biases and norms (timm's rule).
        warmup_epochs: may be a fraction.
        clip_norm: largest norm of the gradients; None: not clipped.
        layer_decay: factor of the rate from block to block towards the input; None: 1.
        parts_scale: factor of the rate of what a method adds (`reduction.*`), which is fresh beside
            a trained model.
        average: decay per step of a moving average of the weights, which the model ends with
            (warmed up as timm does); None: no average.
        autocast: dtype of the forward; None: that of the weights.
    """

    epochs: int
    lr: float
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    warmup_epochs: float = 0.0
    clip_norm: float | None = 1.0
    layer_decay: float | None = None
    parts_scale: float = 1.0
    average: float | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        warmup, epochs = self.warmup_epochs, self.epochs
        decay, average = self.layer_decay, self.average
        for name, valid, rule in (
            ("epochs", epochs >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("warmup_epochs", 0 <= warmup < epochs, f"in [0, {epochs})"),
            ("layer_decay", decay is None or 0 < decay <= 1, "in (0, 1]"),
            ("parts_scale", self.parts_scale > 0, "above 0"),
            ("average", average is None or 0 < average < 1, "in (0, 1)"),
        ):
            if not valid:
                raise out_of_range(name, rule, getattr(self, name))


def out_of_range(name: str, rule: str, got: Any) -> BadInput:
    """The error for a number that breaks a rule: "at least 1", "in [0, 1)"."""
    return BadInput(f"{name} must be {rule} (got {got})", Code.OUT_OF_RANGE, name=name, got=got)


def make_optimizer(model: nn.Module, how: Optimization) -> Optimizer:
    """timm's optimizer over the model's parameters, in groups by decay and rate."""
    groups = None
    if how.parts_scale != 1:
        groups = _groups_with_parts(how.weight_decay, how.layer_decay, how.parts_scale)
    return create_optimizer_v2(
        model,
        opt=how.optimizer,
        lr=how.lr,
        weight_decay=how.weight_decay,
        layer_decay=how.layer_decay,
        param_group_fn=groups,
    )


class CosineSchedule:
    """The learning rate of every step: a linear warm-up, then a cosine to 0."""

    def __init__(self, optimizer: Optimizer, epochs: int, warmup_epochs: float) -> None:
        # timm's scheduler takes fractions, so epochs may have different numbers of steps. Its unit
        # is half an epoch here, because it warns of a period of 1.
        warmup: Any = 2 * warmup_epochs  # annotated int in timm, but any number works
        self.scheduler = CosineLRScheduler(optimizer, t_initial=2 * epochs, warmup_t=warmup)

    def set_rate(self, epoch: int, step: int, steps: int) -> None:
        """Before step `step` of `steps` in an epoch."""
        # half a step ahead, so that neither the first nor the last rate is 0
        self.scheduler.step(2 * (epoch + (step + 0.5) / steps))  # type: ignore[arg-type]


def current_rate(optimizer: Optimizer) -> float:
    """The learning rate without any group's scale."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def make_average(model: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    """The moving average of the weights, warmed up as timm does."""
    return None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True)


def _groups_with_parts(
    weight_decay: float, layer_decay: float | None, scale: float
) -> Callable[[nn.Module], list[dict[str, Any]]]:
    """timm's parameter groups, with `reduction.*` in separate groups whose rate is scaled."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        without_decay: set[str] = getattr(model, "no_weight_decay", set)()
        if layer_decay is None:
            found = param_groups_weight_decay(
                model, weight_decay, no_weight_decay_list=without_decay
            )
        else:
            found = param_groups_layer_decay(
                model, weight_decay, no_weight_decay_list=without_decay, layer_decay=layer_decay
            )
        parts = {id(p) for n, p in model.named_parameters() if n.startswith("reduction.")}
        split = []
        for group in found:
            fresh = [p for p in group["params"] if id(p) in parts]
            rest = [p for p in group["params"] if id(p) not in parts]
            part = {**group, "params": fresh, "lr_scale": group.get("lr_scale", 1.0) * scale}
            split += [g for g in ({**group, "params": rest}, part) if g["params"]]
        return split

    return groups
