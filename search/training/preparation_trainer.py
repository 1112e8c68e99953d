"""The trainer that a method's preparation is given: training, weights and progress on disk.

Implements `methods.engine.preparation.PreparationTrainer`. It knows no method: what is trained is
decided by `Method.prepare`.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import Recipe, Step, Untrained
from vitpareto.methods.engine.preparation import Fit, Progress, WidthsCost
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.files.atomic import delete_file, write_atomic
from vitpareto.search.files.write_through import refresh
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.models.loading import fingerprint, num_classes
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.training.batches import AugmentedBatches, EpochBatches, choose_augmentation
from vitpareto.search.training.loop import fit
from vitpareto.search.training.losses import Distillation, supervised
from vitpareto.search.training.optimizers import Optimization
from vitpareto.search.training.settings import TrainingSettings, seeded, train_candidate

#: The state of a training by epochs, and the last progress that the method saved.
TRAINING_STATE, PROGRESS = "state.pt", "round.json"


@dataclass(frozen=True)
class TrainingImages:
    """The images that training reads.

    Attributes:
        split: training images.
        calibration: calibration images.
        data: the data set's name, as `open_data` takes it.
        head_indices: the model's logits that the labels stand for (None: the labels themselves).
    """

    split: Split
    calibration: Split
    preprocess: Preprocess
    data: str
    head_indices: tuple[int, ...] | None

    def augmentation(self, settings: TrainingSettings) -> str:
        """The augmentation that "auto" means for these images."""
        return choose_augmentation(settings.augment, self.preprocess, self.data)

    def calibration_batches(self, batch: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Calibration images in float32, and labels as indices of the model's logits."""
        head = self.head_indices
        indices = None if head is None else torch.tensor(head, device=device)
        for images, labels in batches_of(
            self.calibration, self.preprocess, batch=batch, device=device, dtype=torch.float32
        ):
            yield images, labels if indices is None else indices[labels]


@dataclass(frozen=True)
class CachedTrainer:
    """One preparation of one method on one model.

    The public functions are documented in `methods.engine.preparation.PreparationTrainer`.

    Attributes:
        method: the method's name.
        model: the model that the method's step acts on; float32, in eval mode.
        teacher: the study's dense model.
        progress: folder of the state that an interrupted preparation resumes from.
        weights: where trained weights are stored.
        cost: cost of a model's widths from a latency table; None: MACs count.
        log: receives one line per epoch or round.
    """

    method: str
    model: nn.Module
    teacher: nn.Module
    images: TrainingImages
    settings: TrainingSettings
    progress: Path
    weights: WeightStore
    cost: WidthsCost | None = None
    log: Callable[[str], None] = lambda message: None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def epochs(self) -> int:
        return self.settings.epochs

    @functools.cached_property
    def batches(self) -> AugmentedBatches:
        """The training images of every epoch, for `update`."""
        images, settings = self.images, self.settings
        return AugmentedBatches(
            images.split,
            images.preprocess,
            num_classes(self.model),
            settings.batch,
            seed=settings.seed,
            augmentation=images.augmentation(settings),
            head_indices=images.head_indices,
            device=str(self.device),
        )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches(0))

    def objective(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        distillation = Distillation(self.settings.distill)
        return supervised(self.teacher, distillation, self.settings.smoothing)(
            model, images, labels
        )

    def calibration_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.images.calibration_batches(self.settings.batch, str(self.device))

    def fit(self, params: dict[str, Any]) -> Fit:
        declared, settings = methods.get(self.method), self.settings
        step = Step(self.method, declared.check(params))
        structural = declared.kind == "structure"
        recipe = Recipe(structure=step) if structural else Recipe(tokens=step)
        model = built_fresh(recipe, self.model, settings)
        history = train_candidate(
            model,
            self.images.split,
            self.images.preprocess,
            settings,
            data=self.images.data,
            head_indices=self.images.head_indices,
            teacher=self.teacher,
            checkpoint=self.progress / TRAINING_STATE,
            about={"model": fingerprint(self.teacher), "recipe": recipe.to_dict()},
            progress=lambda epoch: self.log(f"{epoch}, of {settings.epochs}"),
        )
        return Fit(dict(model.state_dict()), history[-1].loss)

    def update(self, model: nn.Module, index: int, steps: int) -> None:
        settings, device = self.settings, next(model.parameters()).device
        epochs = -(-steps // self.steps_per_epoch)
        per_epoch = -(-steps // epochs)
        with seeded(settings.seed + index, str(device)):
            fit(
                model,
                lambda epoch: _FirstBatches(self.batches(index * epochs + epoch), per_epoch),
                Optimization(
                    epochs,
                    settings.lr,
                    settings.optimizer,
                    settings.weight_decay,
                    autocast=torch.bfloat16 if device.type == "cuda" else None,
                ),
                objective=self.objective,
            )

    def save_weights(self, state: Mapping[str, Tensor]) -> str:
        return self.weights.save(state)

    def load_progress(self) -> Progress | None:
        path = self.progress / PROGRESS
        if not refresh(path):
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return Progress(record, WeightStore(self.progress).load(record.pop("weights")))

    def save_progress(self, progress: Progress) -> None:
        weights = WeightStore(self.progress)
        # the weights first: the file that names them is only valid with them
        digest = weights.save(progress.state)
        record = {**progress.record, "weights": digest}
        write_atomic(self.progress / PROGRESS, json.dumps(record))
        for old in self.progress.glob("*.safetensors"):
            if old != weights.path(digest):
                delete_file(old)

    def report(self, message: str) -> None:
        self.log(message)


def built_fresh(recipe: Recipe, model: nn.Module, settings: TrainingSettings) -> nn.Module:
    """The recipe built on `model`; new parts are the same for the same seed."""
    device = str(next(model.parameters()).device)
    with seeded(settings.seed, device), warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)
        return recipe.build(model)


@dataclass(frozen=True)
class _FirstBatches:
    """The first batches of an epoch. Every epoch has another order, so all images are used."""

    epoch: EpochBatches
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.epoch))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(iter(self.epoch), len(self))
