"""Parts of `Recipe.build`: the check of trained weights, the warning without them, calibration."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.reduced_model import reduced
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.engine.step import Step, short
from vitpareto.methods.engine.weights import load_strictly, weights_digest


class Untrained(UserWarning):
    """A method with trained parts was built without weights, so these parts are fresh.

    Attributes:
        method: the name of the method.
    """

    def __init__(self, method: str) -> None:
        super().__init__(
            f"{method} needs training: without weights= its trained parts are fresh; cost and "
            "shapes are right, accuracy is not"
        )
        self.method = method

    def __reduce__(self) -> tuple[type[Untrained], tuple[str]]:
        return Untrained, (self.method,)


def missing_weights(digest: str, what: str) -> BadInput:
    """The error for a recipe that names weights which were not given. what: what they hold."""
    return BadInput(
        f"weights= must be given: the recipe names the weights {digest}, which hold {what}",
        Code.MISSING,
        name="weights",
        expected=digest,
    )


def check_weights(digest: str | None, weights: Mapping[str, Tensor] | None) -> None:
    """Raises BadInput unless `weights` has this digest. None accepts any weights, or none."""
    if digest is None:
        return
    if weights is None:
        raise missing_weights(digest, "the trained parameters")
    given = weights_digest(weights)
    if given != digest:
        raise BadInput(
            f"weights= must be the state dict {digest} that the recipe names (got {given})",
            Code.MISMATCH,
            name="weights",
            expected=digest,
            got=given,
        )


def warn_if_untrained(step: Step, shape: ModelShape, weights: Mapping[str, Tensor] | None) -> None:
    """Warns with `Untrained` if the step needs training and no weights are given.

    shape: the dimensions of the model that the step is applied to.
    """
    declared = step.declared
    if weights is not None or declared.training != "required":
        return
    if not declared.is_dense(step.params, shape):
        warnings.warn(Untrained(declared.name), stacklevel=3)


def calibrated(
    step: Step,
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor] | None,
    weights: Mapping[str, Tensor] | None,
) -> Step:
    """The step with the outcome of its calibration on `model`, the model after the structural step.

    calibration: normalised images [M, 3, H, W], or batches of them. weights: the trained state dict
    that the built model will hold, so that the calibrated model is the final one.
    """
    declared, params = step.declared, step.params
    if not declared.needs_calibration(params):
        return step
    if calibration is None:
        raise BadInput(
            f"calibration= must be given: {declared.name} with {short(params)} needs calibration "
            "images, or the counts= of an earlier calibration",
            Code.MISSING,
            name="calibration",
            where=declared.name,
        )
    dense = reduced(model, None).eval()
    if weights is not None:
        own = {k: v for k, v in weights.items() if not k.startswith("reduction.")}
        load_strictly(dense, own)
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    with torch.no_grad():
        return replace(step, params=declared.calibrate(dense, params, batches))
