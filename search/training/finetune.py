"""Train a model or a recipe on a data set's training images: what `vitpareto finetune` does.

What comes of it is kept in a folder (`search.training.record`); there, while it is not done,
state.pt is what an interrupted training goes on from. Accuracy is measured on the search images,
which training never sees.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpareto.methods import Recipe, Untrained, model_shape
from vitpareto.search.data.datasets import Data, open_data
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import batches_of, evaluate
from vitpareto.search.models.loading import fingerprint, fresh_model, load_model, num_classes
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.training.loop import Epoch
from vitpareto.search.training.losses import check_teacher
from vitpareto.search.training.record import Accuracy, Trained, finished, keep
from vitpareto.search.training.settings import Settings, seeded, train

Say = Callable[[str], None]
#: What `--teacher` accepts besides a model's name: the model itself before training, or nobody.
ITSELF, NOBODY = "dense", "none"
#: Images a forward, where only accuracy is measured.
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what and how.

    model, weights: as `load_model` takes them; from_scratch: fresh weights instead. recipe: what is
    built from the model and trained, the empty one for the model itself. teacher: a model's name,
    "dense" (the model before training) or "none"; None: "dense" for a recipe on a trained model.
    data, cache: as `open_data` takes them; settings.seed is its seed too.
    """

    model: str
    data: str
    out: Path
    settings: Settings
    cache: Path
    device: str = "cpu"
    recipe: Recipe = Recipe()
    weights: Path | None = None
    from_scratch: bool = False
    teacher: str | None = None
    teacher_weights: Path | None = None


def finetune(
    job: Job,
    *,
    say: Say = lambda _: None,
    progress: Callable[[Epoch], None] | None = None,
    decode: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train as the job says, or go on from where that was interrupted; a finished one is read back.

    `say` hears what was decided, `progress` of every epoch when it ends, `decode` of images.
    Raises UserError for what a user can mend: no training images, a teacher of other classes, a
    folder that holds another training, a loss that is not finite.
    """
    _check(job)
    dense = _start(job)
    # before any image is read
    job.recipe.checked(job.recipe.reshape(model_shape(dense), dense)[0])
    preprocess = Preprocess.of(dense)
    data = _data(job, preprocess, decode)
    renewed = _fit_head(dense, data, job.settings.seed)
    if renewed:
        say(renewed)
    fresh = bool(renewed) or job.from_scratch
    teacher, followed = _teacher(job, dense, preprocess, fresh)
    about = {
        "model": job.model,
        "model_fingerprint": fingerprint(dense),
        "data": job.data,
        "data_fingerprint": data.fingerprint,
        "train_fingerprint": data.split("train").fingerprint,
        "recipe": job.recipe.to_dict(),
        "from_scratch": job.from_scratch,
        "teacher": followed,
        "settings": job.settings.plain(),
    }
    done = finished(job.out, about)
    if done is not None:
        say(f"{job.out} holds this training already, finished")
        return done
    model = _build(job, dense, data, preprocess)
    job.out.mkdir(parents=True, exist_ok=True)
    before = _accuracy(model, job, data, preprocess)
    say(f"before: {before}{' (fresh)' if fresh else ''}")
    state = job.out / "state.pt"
    if state.exists():
        say(f"going on from {state}")
    try:
        history = train(
            model,
            data.split("train"),
            preprocess,
            job.settings,
            data=job.data,
            teacher=teacher,
            checkpoint=state,
            about={k: v for k, v in about.items() if k != "settings"},
            progress=progress,
        )
    except FloatingPointError as error:
        raise UserError(str(error)) from error
    after = _accuracy(model, job, data, preprocess)
    trained = keep(job.out, model, before, after, history, about, fresh)
    state.unlink(missing_ok=True)
    return trained


def _check(job: Job) -> None:
    """UserError for what contradicts itself, before anything is read."""
    if job.from_scratch and job.weights is not None:
        raise UserError("weights are given and training is to start from scratch: leave out one")
    if job.recipe.weights is not None:
        raise UserError(
            f"the recipe names the weights {job.recipe.weights}, and training makes others: leave "
            "`weights` out of it"
        )


def _start(job: Job) -> nn.Module:
    """The dense model, in eval mode, float32."""
    with seeded(job.settings.seed):
        model = fresh_model(job.model) if job.from_scratch else load_model(job.model, job.weights)
    return model.float().to(job.device)


def _data(job: Job, preprocess: Preprocess, decode: Callable[[int, int], None] | None) -> Data:
    data = open_data(job.data, preprocess, cache=job.cache, seed=job.settings.seed, progress=decode)
    if "train" not in data.sizes:
        raise UserError(
            f"{job.data} has no training images (it has {', '.join(data.sizes)}): give a folder "
            "with train/ beside val/, or cifar10"
        )
    return data


def _fit_head(model: nn.Module, data: Data, seed: int) -> str:
    """Give the model a head of the data's classes where it has another; what was done, or ""."""
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
        return f"a new head: {classes} classes, the model had {before}"
    rows = torch.tensor(data.head_indices, device=device)
    with torch.no_grad():
        for name, head in old.items():
            new = cast(nn.Linear, getattr(vit, name))
            new.weight.copy_(head.weight[rows])
            new.bias.copy_(head.bias[rows])
    return f"the head keeps the {classes} classes of {before} that the data has"


def _teacher(
    job: Job, dense: nn.Module, preprocess: Preprocess, fresh: bool
) -> tuple[nn.Module | None, str | None]:
    """Who is followed, given what the student is given, and its fingerprint. UserError for one that
    cannot be.
    """
    asked = job.teacher
    if asked is None:
        asked = NOBODY if fresh or job.recipe == Recipe() else ITSELF
    if asked == NOBODY:
        return None, None
    if asked == ITSELF:
        if fresh:
            raise UserError(
                "the teacher is to be the model itself, whose weights or head are fresh: name a "
                "trained one, or --teacher none"
            )
        return copy.deepcopy(dense), fingerprint(dense)
    teacher = load_model(asked, job.teacher_weights).float().to(job.device)
    check_teacher(teacher, dense)
    own = Preprocess.of(teacher)
    if own.input_size != preprocess.input_size:
        raise UserError(
            f"the teacher {asked} takes images of {list(own.input_size[1:])} pixels and the model "
            f"of {list(preprocess.input_size[1:])}: they must be the same"
        )
    same = (own.mean, own.std) == (preprocess.mean, preprocess.std)
    found = fingerprint(teacher)
    return (teacher if same else Renormalised(teacher, preprocess, own).eval()), found


class Renormalised(nn.Module):
    """A teacher for images [B, 3, H, W] that are normalised as its student is used to."""

    scale: Tensor
    offset: Tensor

    def __init__(self, teacher: nn.Module, student: Preprocess, own: Preprocess) -> None:
        super().__init__()
        self.teacher, self.head = teacher, teacher.head
        mean, std, to_mean, to_std = (
            torch.tensor(v).view(1, 3, 1, 1) for v in (student.mean, student.std, own.mean, own.std)
        )
        device = next(teacher.parameters()).device
        self.register_buffer("scale", (std / to_std).to(device))
        self.register_buffer("offset", ((mean - to_mean) / to_std).to(device))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.teacher(images * self.scale + self.offset))


def _build(job: Job, dense: nn.Module, data: Data, preprocess: Preprocess) -> nn.Module:
    """The candidate as training begins: fresh parts from the seed, calibrated where it asks."""
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


def _accuracy(model: nn.Module, job: Job, data: Data, preprocess: Preprocess) -> Accuracy:
    seen = evaluate(
        model,
        data.split("search"),
        preprocess,
        batch=EVALUATION_BATCH,
        device=job.device,
        dtype=torch.float32,
    )
    right, images = int(seen.top1.sum()), len(seen.top1)
    return Accuracy(100 * float(seen.top1.mean()), *wilson_interval(right, images), images)
