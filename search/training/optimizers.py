"""Optimizer, learning-rate schedule and weight average of a training, on timm's implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer


def make_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    layer_decay: float | None,
    parts_scale: float,
) -> Optimizer:
    """timm's optimizer of this name. layer_decay, parts_scale: as in `loop.fit`."""
    groups = None
    if parts_scale != 1:
        groups = _groups_with_parts(weight_decay, layer_decay, parts_scale)
    return create_optimizer_v2(
        model,
        opt=name,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
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
