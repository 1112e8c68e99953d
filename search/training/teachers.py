"""The teacher of a fine-tuning: the model itself before training, or another one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from vitpareto.methods import Code
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.models.loading import fingerprint, load_model
from vitpareto.search.training.losses import check_teacher

#: What `--teacher` accepts besides a model's name: the model itself before training, or no teacher.
SELF, NO_TEACHER = "dense", "none"


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher for the student's images, and the fingerprint of its weights."""

    model: nn.Module
    fingerprint: str


@dataclass(frozen=True)
class TeacherChoice:
    """name: a model's name, SELF or NO_TEACHER; weights: its weights file."""

    name: str
    weights: Path | None = None

    def load(
        self, student: nn.Module, preprocess: Preprocess, student_fresh: bool
    ) -> Teacher | None:
        """The teacher on the student's device, for the student's images; None for NO_TEACHER.

        student_fresh: whether the student's weights or head are untrained.

        Raises UserError for a teacher with other classes or another input size, and for a student
        that would be taught by its own untrained weights.
        """
        if self.name == NO_TEACHER:
            return None
        if self.name == SELF:
            if student_fresh:
                raise UserError(
                    "the teacher must be trained (got the model itself, whose weights or head are "
                    f"untrained): name a trained model, or use --teacher {NO_TEACHER}",
                    Code.CONFLICT,
                    name="teacher",
                    got=self.name,
                )
            return Teacher(copy.deepcopy(student), fingerprint(student))
        device = next(student.parameters()).device
        teacher = load_model(self.name, self.weights).float().to(device)
        check_teacher(teacher, student)
        teacher_preprocess = Preprocess.of(teacher)
        if teacher_preprocess.input_size != preprocess.input_size:
            got, expected = (list(p.input_size[1:]) for p in (teacher_preprocess, preprocess))
            raise UserError(
                f"the teacher {self.name} must take images of {expected} pixels, as the model does "
                f"(got {got})",
                Code.MISMATCH,
                name="teacher",
                got=got,
                expected=expected,
            )
        digest = fingerprint(teacher)
        if (teacher_preprocess.mean, teacher_preprocess.std) == (preprocess.mean, preprocess.std):
            return Teacher(teacher, digest)
        return Teacher(Renormalised(teacher, preprocess, teacher_preprocess).eval(), digest)


class Renormalised(nn.Module):
    """A teacher that takes images [B, 3, H, W] with the student's normalisation."""

    scale: Tensor
    offset: Tensor

    def __init__(
        self, teacher: nn.Module, student: Preprocess, teacher_preprocess: Preprocess
    ) -> None:
        super().__init__()
        self.teacher, self.head = teacher, teacher.head
        values = (student.mean, student.std, teacher_preprocess.mean, teacher_preprocess.std)
        mean, std, to_mean, to_std = (torch.tensor(v).view(1, 3, 1, 1) for v in values)
        device = next(teacher.parameters()).device
        self.register_buffer("scale", (std / to_std).to(device))
        self.register_buffer("offset", ((mean - to_mean) / to_std).to(device))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.teacher(images * self.scale + self.offset))
