"""`finetune` and `train-demo`: train a model, or a recipe on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpareto.search.commands import options as o
from vitpareto.search.commands.inputs import cache_folder, job_value, job_values, read_recipe
from vitpareto.search.commands.progress_display import ProgressDisplay
from vitpareto.search.commands.terminal import log

if TYPE_CHECKING:
    from vitpareto.search.training.fine_tuning import FinetuneJob

RecipeToTrain = Annotated[Path | None, typer.Option(help="Recipe to train (YAML) [dense]")]
FromScratch = Annotated[bool, typer.Option("--from-scratch", help="Start from random weights")]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Teacher: a model; dense for --model before training; none [dense for a recipe]"
    ),
]
TeacherWeights = Annotated[Path | None, typer.Option(help="Weights of the teacher")]
Distill = Annotated[str, typer.Option(help="Distillation: soft or hard")]
Epochs = Annotated[int, typer.Option(help="Epochs over the training images")]
LearningRate = Annotated[float | None, o.job_option("lr", "1e-4; from scratch 1e-3")]
Mixup = Annotated[float, typer.Option(help="Alpha of timm's mixup; 0 for none")]
Smoothing = Annotated[float, typer.Option(help="Label smoothing")]
Augment = Annotated[
    str, typer.Option(help="Augmentation: auto, none, shift, shift-flip, crop or crop-flip")
]
Out = Annotated[Path, typer.Option(help="Output folder; an interrupted training continues")]


def add_to(app: typer.Typer) -> None:
    app.command("finetune")(finetune_command)
    app.command("train-demo")(train_demo_command)


@o.with_job_options("model", "data", "weights", "seed", "device", "cache")
def finetune_command(
    recipe: RecipeToTrain = None,
    from_scratch: FromScratch = False,
    teacher: Teacher = None,
    teacher_weights: TeacherWeights = None,
    distill: Distill = "soft",
    epochs: Epochs = 5,
    lr: LearningRate = None,
    batch: Annotated[int | None, o.job_option("train_batch")] = None,
    mixup: Mixup = 0.0,
    smoothing: Smoothing = 0.1,
    augment: Augment = "auto",
    out: Out = Path("trained"),
    **options: Any,
) -> None:
    """Train a model, or a recipe on it, and save the weights, from which a search can start.

    \b
    vitpareto finetune --model vit_small_patch16_224 --data cifar10 --epochs 5 --out vit-s
    vitpareto finetune --model deit_small_patch16_224 --data /imagenet --recipe recipe.yaml
    vitpareto finetune --model deit_small_patch16_224 --data /imagenet --from-scratch --epochs 300
    """
    from vitpareto.methods import Recipe
    from vitpareto.search.measure.device import resolve_device
    from vitpareto.search.training.fine_tuning import FinetuneJob
    from vitpareto.search.training.settings import TrainingSettings

    given = job_values(options)
    settings = TrainingSettings(
        epochs, 1e-3 if lr is None and from_scratch else job_value("lr", lr),
        job_value("train_batch", batch, "--batch"), smoothing, mixup, augment, given["seed"],
        distill,
        # from scratch no part of the model is newer than the rest
        parts_scale=1.0 if from_scratch else TrainingSettings.parts_scale,
    )  # fmt: skip
    job = FinetuneJob(
        given["model"], given["data"], out, settings, cache_folder(given["cache"]),
        resolve_device(given["device"]),
        read_recipe(recipe) if recipe is not None else Recipe(),
        Path(given["weights"]) if given["weights"] else None,
        from_scratch, teacher, teacher_weights,
    )  # fmt: skip
    _train(job, recipe)


def _train(job: FinetuneJob, recipe: Path | None) -> None:
    """Train, and print accuracy, weights and the next command."""
    from vitpareto.search.training.fine_tuning import finetune

    begin, epochs = time.monotonic(), job.settings.epochs
    with ProgressDisplay() as display:
        trained = finetune(
            job,
            say=log,
            decode=display.counter("decoding images"),
            progress=lambda epoch: log(
                f"{epoch}; {epochs - epoch.index - 1} to go, {time.monotonic() - begin:.0f} s"
            ),
        )
    typer.echo(f"{trained.recipe}: before {trained.before}")
    typer.echo(f"{trained.recipe}: after  {trained.after}")
    typer.echo(f"weights: {job.out / 'model.safetensors'}")
    typer.echo(trained.next_step(job.model, job.weights, job.data, recipe))


def train_demo_command(
    out: Annotated[Path, typer.Option(help="File to write")] = Path("digits_vit.safetensors"),
    epochs: Annotated[int | None, typer.Option(help="Epochs [as the shipped weights]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the image order")] = 0,
) -> None:
    """Train the embedded model from scratch, as the shipped weights were trained.

    \b
    vitpareto train-demo --out digits_vit.safetensors
    """
    from vitpareto.search.training import embedded

    options = {} if epochs is None else {"epochs": epochs}
    report = embedded.train_embedded(
        out, seed=seed, progress=lambda line: log(str(line)), **options
    )
    typer.echo(json.dumps(report))
