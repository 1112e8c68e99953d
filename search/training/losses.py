"""What training minimises: labels, a teacher's answers, and what a reduction adds of its own.

Objectives are functions of model, images and labels, for `search.training.loop.fit`. A reduction's
own part comes back with the tokens of its forward (`Reduction.penalty`, `Tokens.kept`): nothing is
read off modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitpareto.methods.engine.forward import (
    ReducedVisionTransformer,
    ReducedVisionTransformerDistilled,
)
from vitpareto.methods.engine.tokens import Tokens
from vitpareto.search.errors import UserError
from vitpareto.search.models.loading import num_classes
from vitpareto.search.training.loop import Objective

KINDS = ("soft", "hard")
#: DynamicViT's lambda_KL and lambda_distill: on logits, and on the tokens kept
LOGITS_WEIGHT, TOKENS_WEIGHT = 0.5, 0.5


@dataclass(frozen=True)
class Distillation:
    """How a teacher is followed (Touvron et al., "Training data-efficient image transformers &
    distillation through attention", ICML 2021, eq. 2 and 3).

    soft: `(1 - w) CE(labels) + w t^2 KL(teacher / t || student / t)`, logits divided by the
    temperature t; hard: `(1 - w) CE(labels) + w CE(the teacher's first class)`. The defaults are
    the paper's: weight 0.1 and temperature 3 for soft, a half for hard.
    """

    kind: str = "soft"
    weight: float | None = None
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"distillation is {self.kind!r}: accepted is {' or '.join(KINDS)}")
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise UserError(f"the distillation's weight is {self.weight}: accepted is 0 to 1")
        if not self.temperature > 0:
            raise UserError(f"the temperature is {self.temperature}: accepted is above 0")

    @property
    def share(self) -> float:
        """The weight, the paper's where none was given."""
        return (0.1 if self.kind == "soft" else 0.5) if self.weight is None else self.weight

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's part, unweighted, of logits [B, classes]: a scalar."""
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        return self.temperature**2 * divergence(student, teacher, self.temperature)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits [B, classes] at a temperature: the mean over images."""
    ours = F.log_softmax(student / temperature, dim=1)
    theirs = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of logits [B, classes] with labels [B], smoothed, or with soft targets
    [B, classes] as they are (mixup has smoothed them).
    """
    return F.cross_entropy(logits, labels, label_smoothing=smoothing if labels.dim() == 1 else 0.0)


def supervised(
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    smoothing: float = 0.0,
) -> Objective:
    """The objective for a dense or reduced model, with or without a teacher.

    Labels are [B], or soft targets [B, classes]. A model that answers with two heads in training
    (`two_heads`) shows the class head the labels and the other one the teacher. A reduction's
    penalty is added; where it marks who is kept (DynamicViT), the teacher is followed as its paper
    does: cross-entropy, 0.5 KL on logits, and 0.5 times the mean squared distance of the final
    tokens kept from the teacher's, where those are as many and as wide.

    The teacher is put in eval mode. Raises UserError for smoothing out of range, and for a teacher
    whose classes differ from the model's.
    """
    if not 0 <= smoothing < 1:
        raise UserError(f"label smoothing is {smoothing}: accepted is from 0 to below 1")
    follow = distillation if distillation is not None else Distillation()
    if teacher is not None:
        teacher.eval()

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits, tokens = answers(model, images)
        of_labels, of_teacher = logits if isinstance(logits, tuple) else (logits, logits)
        loss = label_loss(of_labels, labels, smoothing)
        if teacher is not None:
            said, features = _taught(teacher, images, tokens)
            if said.shape != of_teacher.shape:
                raise _other_classes(said.shape[1], of_teacher.shape[1])
            if tokens is not None and tokens.kept is not None:
                loss = loss + LOGITS_WEIGHT * divergence(of_teacher, said)
                loss = loss + TOKENS_WEIGHT * token_distance(model, tokens, features)
            else:
                loss = (1 - follow.share) * loss + follow.share * follow.loss(of_teacher, said)
        elif of_teacher is not of_labels:
            loss = (loss + label_loss(of_teacher, labels, smoothing)) / 2
        if tokens is not None:
            penalty = cast(ReducedVisionTransformer, model).reduction.penalty(tokens)
            loss = loss if penalty is None else loss + penalty
        return loss

    return objective


def answers(model: nn.Module, images: Tensor) -> tuple[Any, Tokens | None]:
    """(logits [B, classes] or a pair of them, final tokens): a model not reduced has no tokens."""
    if isinstance(model, (ReducedVisionTransformer, ReducedVisionTransformerDistilled)):
        tokens, _ = model.run(images)
        return model.classify(tokens), tokens
    return model(images), None


def _taught(
    teacher: nn.Module, images: Tensor, tokens: Tokens | None
) -> tuple[Tensor, Tensor | None]:
    """(the teacher's logits, and its normalised final tokens where the student marks its own)."""
    with torch.no_grad():
        if tokens is None or tokens.kept is None or not isinstance(teacher, VisionTransformer):
            return teacher(images), None
        features = teacher.forward_features(images)
        return teacher.forward_head(features), features


def token_distance(model: nn.Module, tokens: Tokens, features: Tensor | None) -> Tensor:
    """Mean squared distance of the kept patches' normalised tokens from the teacher's [B, N, C]; 0
    where the teacher's are not comparable (DynamicViT's L_distill; a mean over channels too).
    """
    own = cast(VisionTransformer, model).norm(tokens.x)
    kept = tokens.kept
    if features is None or kept is None or features.shape != own.shape:
        return own.new_zeros(())
    kept = kept.detach()
    off = (own - features)[:, tokens.prefix :].square().mean(dim=2)
    return (off * kept).sum() / kept.sum().clamp_min(1)


def check_teacher(teacher: nn.Module, model: nn.Module) -> None:
    """UserError, with both numbers, unless teacher and model tell as many classes apart."""
    ours, theirs = num_classes(model), num_classes(teacher)
    if ours != theirs:
        raise _other_classes(theirs, ours)


def _other_classes(theirs: int, ours: int) -> UserError:
    return UserError(
        f"the teacher has {theirs} classes and the model {ours}: a teacher of the same classes "
        "is needed"
    )


@contextlib.contextmanager
def two_heads(model: nn.Module, apart: bool) -> Iterator[None]:
    """A distilled model's heads answer apart in training while this is open, where `apart`; any
    other model is left alone.
    """
    if not apart or not hasattr(model, "set_distilled_training"):
        yield
        return
    distilled = cast(ReducedVisionTransformerDistilled, model)
    before = distilled.distilled_training
    distilled.set_distilled_training(True)
    try:
        yield
    finally:
        distilled.set_distilled_training(before)
