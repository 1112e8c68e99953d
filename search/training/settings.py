"""Train a built candidate on a study's images: the settings there are, and one call.

Fine-tuning, training from scratch, a trial's own training and recovery differ in what they build
and in what they keep; this is what they share.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.models.loading import num_classes
from vitpareto.search.training.batches import TrainImages, choose_augmentation
from vitpareto.search.training.checkpoints import Checkpoint
from vitpareto.search.training.loop import Epoch, fit
from vitpareto.search.training.losses import Distillation, check_teacher, supervised, two_heads


@dataclass(frozen=True)
class Settings:
    """How a candidate is trained. All of it decides the weights: it goes into every record.

    epochs; lr: the highest learning rate; batch: images a step; smoothing: of labels; mixup: timm's
    alpha (0: none); augment: "auto" or one of `batches.AUGMENTATIONS`; seed: of order, augmentation
    and every draw in training; distill: "soft" or "hard", where there is a teacher; warmup: part of
    the epochs over which the rate rises; layer_decay, parts_scale, average: `fit`'s.
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
        for name, good, accepted in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("lr", 0 < self.lr < float("inf"), "above 0"),
            ("batch", self.batch >= 1, "1 or more"),
            ("smoothing", 0 <= self.smoothing < 1, "from 0 to below 1"),
            ("mixup", 0 <= self.mixup < float("inf"), "0 (none) or above"),
            ("weight_decay", 0 <= self.weight_decay < float("inf"), "0 or above"),
            ("warmup", 0 <= self.warmup < 1, "from 0 to below 1"),
            ("parts_scale", 0 < self.parts_scale < float("inf"), "above 0"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}: accepted is {accepted}")
        Distillation(self.distill)  # refuses an unknown kind

    def plain(self) -> dict[str, Any]:
        """In JSON's types."""
        return dataclasses.asdict(self)


@contextlib.contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """torch's generators begin at `seed` in here, and are afterwards as they were. Build fresh
    parts in it, so that they are the same every time.
    """
    with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(seed)
        yield


def train(
    model: nn.Module,
    split: Split,
    preprocess: Preprocess,
    settings: Settings,
    *,
    data: str = "",
    head_indices: tuple[int, ...] | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    about: dict[str, Any] | None = None,
    progress: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train `model` (dense or reduced, float32) in place on a decoded split; left in eval mode.

    data: the images' name, as `open_data` takes it. head_indices: as `search.measure.accuracy`
    takes them. teacher: a model of the same classes and input to follow; on the model's device.
    checkpoint: a file that keeps the state after every epoch; where it is there already, training
    goes on from it, and where it is of another training it is refused. about: what else that
    training depends on (JSON's types): model, data, recipe. On a GPU the forward is bfloat16 by
    autocast.

    Raises UserError for settings, teacher or checkpoint that do not fit, FloatingPointError for a
    loss that is not finite.
    """
    device = next(model.parameters()).device
    if teacher is not None:
        check_teacher(teacher, model)
    augmentation = choose_augmentation(settings.augment, preprocess, data)
    images = TrainImages(
        split,
        preprocess,
        num_classes(model),
        settings.batch,
        seed=settings.seed,
        augmentation=augmentation,
        mixup=settings.mixup,
        smoothing=settings.smoothing,
        head_indices=head_indices,
        device=str(device),
    )
    objective = supervised(teacher, Distillation(settings.distill), settings.smoothing)
    kept = state = None
    if checkpoint is not None:
        decides = {**settings.plain(), "augment": augmentation, "images": split.fingerprint}
        kept = Checkpoint(checkpoint, {**decides, "teacher": teacher is not None, **(about or {})})
        state = kept.load(model)
    with seeded(settings.seed, str(device)), two_heads(model, teacher is not None):
        return fit(
            model,
            images,
            epochs=settings.epochs,
            lr=settings.lr,
            objective=objective,
            optimizer=settings.optimizer,
            weight_decay=settings.weight_decay,
            warmup_epochs=settings.warmup * settings.epochs,
            layer_decay=settings.layer_decay,
            parts_scale=settings.parts_scale,
            average=settings.average,
            autocast=torch.bfloat16 if device.type == "cuda" else None,
            state=state,
            keep=None if kept is None else kept.save,
            progress=progress,
        )
