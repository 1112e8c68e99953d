"""Train a model or a recipe on a data set's training images: what `vitpareto finetune` does.

The result is written to a folder (`search.training.finetune_result`). Until the training is
finished, state.pt in that folder is what an interrupted training continues from. Accuracy is
measured on the search images, which training never sees.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitpareto.methods import Code, Recipe, Untrained, model_shape
from vitpareto.search.data.datasets import Data, open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import batches_of, evaluate
from vitpareto.search.models.loading import fingerprint, fresh_model, load_model, num_classes
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.training.finetune_result import (
    FinetuneResult,
    TopOne,
    load_result,
    save_result,
)
from vitpareto.search.training.loop import Epoch
from vitpareto.search.training.settings import TrainingSettings, seeded, train_candidate
from vitpareto.search.training.teachers import NO_TEACHER, SELF, Teacher, TeacherChoice

Log = Callable[[str], None]
#: images per forward where only accuracy is measured
EVALUATION_BATCH = 64
#: the state of an unfinished training
STATE = "state.pt"


@dataclass(frozen=True)
class FinetuneJob:
    """What is trained, on what and how.

    Attributes:
        model, weights: as `load_model` takes them.
        data, cache: as `open_data` takes them; its seed is `settings.seed`.
        out: the folder of the result.
        recipe: what is built from the model and trained; the empty one is the model itself.
        from_scratch: start from fresh weights.
        teacher: a model's name, "dense" (the model before training) or "none". None: "dense" for a
            recipe on a trained model, otherwise "none".
    """

    model: str
    data: str
    out: Path
    settings: TrainingSettings
    cache: Path
    device: str = "cpu"
    recipe: Recipe = Recipe()
    weights: Path | None = None
    from_scratch: bool = False
    teacher: str | None = None
    teacher_weights: Path | None = None

    def check(self) -> None:
        """UserError for inputs that exclude each other."""
        if self.from_scratch and self.weights is not None:
            raise UserError(
                "weights and from_scratch exclude each other: leave out one of them",
                Code.CONFLICT,
                name="weights",
            )
        if self.recipe.weights is not None:
            raise UserError(
                f"the recipe must not name weights, which training replaces (got "
                f"{self.recipe.weights}): remove `weights` from it",
                Code.CONFLICT,
                name="recipe.weights",
                got=self.recipe.weights,
            )

    def start_model(self) -> nn.Module:
        """The dense model before training, in eval mode, float32."""
        with seeded(self.settings.seed):
            if self.from_scratch:
                model = fresh_model(self.model)
            else:
                model = load_model(self.model, self.weights)
        return model.float().to(self.device)

    def open_data(self, preprocess: Preprocess, decode: Callable[[int, int], None] | None) -> Data:
        """The data set. UserError if it has no training images."""
        data = open_data(
            self.data, preprocess, cache=self.cache, seed=self.settings.seed, progress=decode
        )
        if "train" not in data.sizes:
            raise UserError(
                f"data {self.data} has no training images (its splits are "
                f"{', '.join(data.sizes)}): use a folder with train/ next to val/, or cifar10",
                Code.MISSING,
                name="train",
                data=self.data,
                splits=list(data.sizes),
            )
        return data


def finetune(
    job: FinetuneJob,
    *,
    say: Log = lambda message: None,
    progress: Callable[[Epoch], None] | None = None,
    decode: Callable[[int, int], None] | None = None,
) -> FinetuneResult:
    """Train as the job says, continue an interrupted training, or read a finished one back.

    Args:
        say: called with one line per decision.
        progress: called with every finished epoch.
        decode: called with (images decoded, images in total).

    Raises UserError for input that can be corrected: no training images, a teacher with other
    classes, a folder that holds another training, a loss that is not finite.
    """
    job.check()
    dense = job.start_model()
    # before any image is read
    job.recipe.checked(job.recipe.reshape(model_shape(dense), dense)[0])
    preprocess = Preprocess.of(dense)
    data = job.open_data(preprocess, decode)
    new_head = fit_head(dense, data, job.settings.seed)
    if new_head:
        say(new_head)
    fresh = bool(new_head) or job.from_scratch
    teacher = _teacher(job, dense, preprocess, fresh)
    inputs = _inputs(job, dense, data, teacher)
    finished = load_result(job.out, inputs)
    if finished is not None:
        say(f"{job.out} already holds this training, finished")
        return finished
    model = _build(job, dense, data, preprocess)
    job.out.mkdir(parents=True, exist_ok=True)
    before = _accuracy(model, job, data, preprocess)
    say(f"before: {before}{' (fresh)' if fresh else ''}")
    history = _train(job, model, teacher, data, preprocess, inputs, say, progress)
    after = _accuracy(model, job, data, preprocess)
    result = save_result(job.out, model, before, after, history, inputs, fresh)
    (job.out / STATE).unlink(missing_ok=True)
    return result


def _train(
    job: FinetuneJob,
    model: nn.Module,
    teacher: Teacher | None,
    data: Data,
    preprocess: Preprocess,
    inputs: dict[str, Any],
    say: Log,
    progress: Callable[[Epoch], None] | None,
) -> list[Epoch]:
    """Train the built model in place, or continue its interrupted training.

    Raises UserError for a loss that is not finite.
    """
    state = job.out / STATE
    if state.exists():
        say(f"continuing from {state}")
    try:
        return train_candidate(
            model,
            data.split("train"),
            preprocess,
            job.settings,
            data=job.data,
            teacher=None if teacher is None else teacher.model,
            checkpoint=state,
            about={k: v for k, v in inputs.items() if k != "settings"},
            progress=progress,
        )
    except FloatingPointError as error:
        raise UserError(str(error), Code.OUT_OF_RANGE, name="lr", got=job.settings.lr) from error


def _inputs(
    job: FinetuneJob, dense: nn.Module, data: Data, teacher: Teacher | None
) -> dict[str, Any]:
    """Everything that the training depends on, as JSON values (in training.json)."""
    return {
        "model": job.model,
        "model_fingerprint": fingerprint(dense),
        "data": job.data,
        "data_fingerprint": data.fingerprint,
        "train_fingerprint": data.split("train").fingerprint,
        "recipe": job.recipe.to_dict(),
        "from_scratch": job.from_scratch,
        "teacher": None if teacher is None else teacher.fingerprint,
        "settings": job.settings.to_json(),
    }


def fit_head(model: nn.Module, data: Data, seed: int) -> str:
    """Replace the head if the data has another number of classes.

    The rows of an ImageNet-1k head are kept for the classes that the data names. Returns what was
    done in one line; "" if nothing.
    """
    before, classes = num_classes(model), len(data.classes)
    if before == classes:
        return ""
    vit = cast(VisionTransformer, model)
    heads = [name for name in ("head", "head_dist") if hasattr(vit, name)]
    old = {name: copy.deepcopy(cast(nn.Linear, getattr(vit, name))) for name in heads}
    device = str(next(model.parameters()).device)
    with seeded(seed, device):
        vit.reset_classifier(classes)
    vit.to(device)
    if data.head_indices is None or before != 1000:
        return f"new head with {classes} classes (the model had {before})"
    rows = torch.tensor(data.head_indices, device=device)
    with torch.no_grad():
        for name, head in old.items():
            new = cast(nn.Linear, getattr(vit, name))
            new.weight.copy_(head.weight[rows])
            new.bias.copy_(head.bias[rows])
    return f"head reduced to the data's {classes} of {before} classes"


def _teacher(
    job: FinetuneJob, dense: nn.Module, preprocess: Preprocess, fresh: bool
) -> Teacher | None:
    name = job.teacher
    if name is None:
        name = NO_TEACHER if fresh or job.recipe == Recipe() else SELF
    return TeacherChoice(name, job.teacher_weights).load(dense, preprocess, fresh)


def _build(job: FinetuneJob, dense: nn.Module, data: Data, preprocess: Preprocess) -> nn.Module:
    """The candidate before training, calibrated if needed; fresh parts come from the seed."""
    calibration = (
        images
        for images, _ in batches_of(
            data.split("calibration"),
            preprocess,
            batch=EVALUATION_BATCH,
            device=job.device,
            dtype=torch.float32,
        )
    )
    with seeded(job.settings.seed, job.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)
        return job.recipe.build(dense, calibration)


def _accuracy(model: nn.Module, job: FinetuneJob, data: Data, preprocess: Preprocess) -> TopOne:
    correct = evaluate(
        model,
        data.split("search"),
        preprocess,
        batch=EVALUATION_BATCH,
        device=job.device,
        dtype=torch.float32,
    ).top1
    low, high = wilson_interval(int(correct.sum()), len(correct))
    return TopOne(100 * float(correct.mean()), low, high, len(correct))
