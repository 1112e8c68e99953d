"""Losses of training: from labels, from a teacher, and from the reduction itself.

An objective is a function of model, images and labels, for `search.training.loop.fit`. What a
reduction adds comes with the tokens of its forward (`Reduction.penalty`, `Tokens.kept`), not from
attributes of modules.
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

from vitpareto.methods import Code
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
    """The loss from a teacher (Touvron et al., "Training data-efficient image transformers &
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
            raise UserError(
                f"distill must be {' or '.join(KINDS)} (got {self.kind!r})",
                Code.UNKNOWN_NAME,
                name="distill",
                got=self.kind,
            )
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise _out_of_range("weight", "in [0, 1]", self.weight)
        if not self.temperature > 0:
            raise _out_of_range("temperature", "above 0", self.temperature)

    @property
    def share(self) -> float:
        """The weight; the paper's if none was given."""
        return (0.1 if self.kind == "soft" else 0.5) if self.weight is None else self.weight

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The teacher's loss, unweighted, of logits [B, classes]: a scalar."""
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        return self.temperature**2 * divergence(student, teacher, self.temperature)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits [B, classes] at a temperature: the mean over images."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of logits [B, classes] with labels [B], smoothed, or with soft targets
    [B, classes], which mixup has smoothed already.
    """
    return F.cross_entropy(logits, labels, label_smoothing=smoothing if labels.dim() == 1 else 0.0)


def supervised(
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    smoothing: float = 0.0,
) -> Objective:
    """The objective for a dense or reduced model, with or without a teacher.

    Labels are [B], or soft targets [B, classes]. If the model returns the logits of two heads in
    training (`two_heads`), the class head learns from the labels and the other one from the
    teacher. A reduction's penalty is added. If the reduction marks the tokens that are kept
    (DynamicViT), the loss is that of its paper: cross-entropy, 0.5 KL on logits, and 0.5 times the
    mean squared distance of the kept final tokens from the teacher's, if those have the same shape.

    The teacher is put in eval mode. Raises UserError for smoothing out of range, and for a teacher
    whose classes differ from the model's.
    """
    if not 0 <= smoothing < 1:
        raise _out_of_range("smoothing", "in [0, 1)", smoothing)
    distillation = distillation if distillation is not None else Distillation()
    if teacher is not None:
        teacher.eval()

    def objective(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits, tokens = logits_and_tokens(model, images)
        label_logits, teacher_logits = logits if isinstance(logits, tuple) else (logits, logits)
        loss = label_loss(label_logits, labels, smoothing)
        if teacher is not None:
            targets, features = _teacher_outputs(teacher, images, tokens)
            if targets.shape != teacher_logits.shape:
                raise _other_classes(targets.shape[1], teacher_logits.shape[1])
            if tokens is not None and tokens.kept is not None:
                loss = loss + LOGITS_WEIGHT * divergence(teacher_logits, targets)
                loss = loss + TOKENS_WEIGHT * token_distance(model, tokens, features)
            else:
                share = distillation.share
                loss = (1 - share) * loss + share * distillation.loss(teacher_logits, targets)
        elif teacher_logits is not label_logits:
            loss = (loss + label_loss(teacher_logits, labels, smoothing)) / 2
        if tokens is not None:
            penalty = cast(ReducedVisionTransformer, model).reduction.penalty(tokens)
            loss = loss if penalty is None else loss + penalty
        return loss

    return objective


def logits_and_tokens(model: nn.Module, images: Tensor) -> tuple[Any, Tokens | None]:
    """Logits [B, classes] or a pair of them, and the final tokens; None if the model is dense."""
    if isinstance(model, (ReducedVisionTransformer, ReducedVisionTransformerDistilled)):
        tokens, _ = model.run(images)
        return model.classify(tokens), tokens
    return model(images), None


def _teacher_outputs(
    teacher: nn.Module, images: Tensor, tokens: Tokens | None
) -> tuple[Tensor, Tensor | None]:
    """The teacher's logits, and its normalised final tokens if the student marks those kept."""
    with torch.no_grad():
        if tokens is None or tokens.kept is None or not isinstance(teacher, VisionTransformer):
            return teacher(images), None
        features = teacher.forward_features(images)
        return teacher.forward_head(features), features


def token_distance(model: nn.Module, tokens: Tokens, features: Tensor | None) -> Tensor:
    """Mean squared distance of the kept patches' normalised tokens from the teacher's [B, N, C],
    also over channels (DynamicViT's L_distill). 0 if the teacher's tokens have another shape.
    """
    normed = cast(VisionTransformer, model).norm(tokens.x)
    kept = tokens.kept
    if features is None or kept is None or features.shape != normed.shape:
        return normed.new_zeros(())
    kept = kept.detach()
    distance = (normed - features)[:, tokens.prefix :].square().mean(dim=2)
    return (distance * kept).sum() / kept.sum().clamp_min(1)


def check_teacher(teacher: nn.Module, model: nn.Module) -> None:
    """UserError if the teacher and the model have different numbers of classes."""
    student_classes, teacher_classes = num_classes(model), num_classes(teacher)
    if student_classes != teacher_classes:
        raise _other_classes(teacher_classes, student_classes)


def _other_classes(teacher_classes: int, student_classes: int) -> UserError:
    return UserError(
        f"the teacher must have the model's {student_classes} classes (got {teacher_classes})",
        Code.MISMATCH,
        name="teacher",
        got=teacher_classes,
        expected=student_classes,
    )


def _out_of_range(name: str, rule: str, got: float) -> UserError:
    return UserError(f"{name} must be {rule} (got {got})", Code.OUT_OF_RANGE, name=name, got=got)


@contextlib.contextmanager
def two_heads(model: nn.Module, separate: bool) -> Iterator[None]:
    """In this context a distilled model returns the logits of both heads in training, if
    `separate`. Any other model is left alone.
    """
    if not separate or not hasattr(model, "set_distilled_training"):
        yield
        return
    distilled = cast(ReducedVisionTransformerDistilled, model)
    before = distilled.distilled_training
    distilled.set_distilled_training(True)
    try:
        yield
    finally:
        distilled.set_distilled_training(before)
