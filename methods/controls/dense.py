"""The dense model as a method: the reference of every comparison."""

from __future__ import annotations

from typing import Any

from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.reduction import Reduction
from vitpareto.methods.engine.shape import ModelShape


@register
class Dense(Method):
    """The unchanged model, trial 0 of every study."""

    name = "dense"
    summary = "the model as it is"
    control = True
    is_reference = True
    identity = {}

    def reduction(self, params: dict[str, Any], shape: ModelShape) -> Reduction:
        return Reduction()
