"""The settings of a training, and one call that trains a built candidate with them.

Fine-tuning, training from scratch, a trial's own training and recovery share this module. They
differ in what they build and what they store.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitpareto.methods import Code
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.models.loading import num_classes
from vitpareto.search.training.batches import AugmentedBatches, choose_augmentation
from vitpareto.search.training.checkpoints import TrainingCheckpoint
from vitpareto.search.training.loop import Epoch, fit
from vitpareto.search.training.losses import Distillation, check_teacher, supervised, two_heads
from vitpareto.search.training.optimizers import Optimization


@dataclass(frozen=True)
class TrainingSettings:
    """How a candidate is trained. All settings decide the weights, and are part of every record.

    Attributes:
        lr: the highest learning rate.
        batch: images per step.
        smoothing: of labels, in [0, 1).
        mixup: timm's alpha; 0: none.
        augment: "auto" or one of `batches.AUGMENTATIONS`.
        seed: of order, augmentation and all random draws in training.
        distill: "soft" or "hard", used if there is a teacher.
        warmup: fraction of the epochs over which the rate rises.
        layer_decay, parts_scale, average: as in `optimizers.Optimization`.
    """

    epochs: int = 5
    lr: float = 1e-4
    batch: int = 128
    smoothing: float = 0.1
    mixup: float = 0.0
    augment: str = "auto"
    seed: int = 0
    distill: str = "soft"
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    warmup: float = 0.1
    layer_decay: float | None = None
    parts_scale: float = 30.0
    average: float | None = None

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", 0 < self.lr < float("inf"), "above 0"),
            ("batch", self.batch >= 1, "at least 1"),
            ("smoothing", 0 <= self.smoothing < 1, "in [0, 1)"),
            ("mixup", 0 <= self.mixup < float("inf"), "0 or above"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or above"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("parts_scale", 0 < self.parts_scale < float("inf"), "above 0"),
        ):
            if not valid:
                got = getattr(self, name)
                raise UserError(
                    f"{name} must be {rule} (got {got})", Code.OUT_OF_RANGE, name=name, got=got
                )
        Distillation(self.distill)  # raises for an unknown kind

    def to_json(self) -> dict[str, Any]:
        """As stored with what was trained."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrainingSettings:
        """The settings of a record's JSON, which may hold other keys too."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in names})

    def of_batches(self) -> dict[str, Any]:
        """The fields of `AugmentedBatches` that are settings."""
        return {name: getattr(self, name) for name in ("batch", "seed", "mixup", "smoothing")}

    def optimization(self, device: torch.device) -> Optimization:
        """How the weights are updated on this device: on a GPU the forward runs in bfloat16."""
        return Optimization(
            self.epochs,
            self.lr,
            self.optimizer,
            self.weight_decay,
            warmup_epochs=self.warmup * self.epochs,
            layer_decay=self.layer_decay,
            parts_scale=self.parts_scale,
            average=self.average,
            autocast=torch.bfloat16 if device.type == "cuda" else None,
        )


@contextlib.contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """torch's generators start at `seed` in this context, and are restored afterwards. Fresh parts
    that are built in it are the same every time.
    """
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        yield


def train_candidate(
    model: nn.Module,
    split: Split,
    preprocess: Preprocess,
    settings: TrainingSettings,
    *,
    data: str = "",
    head_indices: tuple[int, ...] | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `model` (dense or reduced, float32) in place on a decoded split; left in eval mode.

    Args:
        data: the data set's name, as `open_data` takes it.
        head_indices: as `search.measure.accuracy` takes them.
        teacher: a model with the same classes and input, on the model's device.
        checkpoint: file with the state after every epoch. If it exists, training continues from
            it.
        about: what else the training depends on (JSON values): model, data, recipe.

    Raises UserError if settings, teacher or checkpoint do not fit, FloatingPointError for a loss
    that is not finite.
    """
    device = next(model.parameters()).device
    if teacher is not None:
        check_teacher(teacher, model)
    images = AugmentedBatches(
        split,
        preprocess,
        num_classes(model),
        augmentation=choose_augmentation(settings.augment, preprocess, data),
        head_indices=head_indices,
        device=str(device),
        **settings.of_batches(),
    )
    stored = None
    if checkpoint is not None:
        inputs = {**settings.to_json(), "augment": images.augmentation, "images": split.fingerprint}
        inputs |= {"teacher": teacher is not None, **(about or {})}
        stored = TrainingCheckpoint(checkpoint, inputs)
    with seeded(settings.seed, str(device)), two_heads(model, teacher is not None):
        return fit(
            model,
            images,
            settings.optimization(device),
            objective=supervised(teacher, Distillation(settings.distill), settings.smoothing),
            state=None if stored is None else stored.load(model),
            on_state=None if stored is None else stored.save,
            progress=progress,
        )
