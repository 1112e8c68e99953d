"""`finetune` and `train-demo`: train a model, or a recipe on it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from vitpareto.search.commands.inputs import cache_folder, read_recipe
from vitpareto.search.commands.options import Cache, Data, Device, Model, Seed, Weights
from vitpareto.search.commands.progress import ProgressDisplay
from vitpareto.search.commands.terminal import log


def add_to(app: typer.Typer) -> None:
    app.command("finetune")(finetune_command)
    app.command("train-demo")(train_demo_command)


def finetune_command(
    model: Model = None,
    data: Data = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe to train (YAML) [dense]")] = None,
    weights: Weights = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from random weights")
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Teacher: a model; dense for --model before training; none [dense for a recipe]"
        ),
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Weights of the teacher")] = None,
    distill: Annotated[str, typer.Option(help="Distillation: soft or hard")] = "soft",
    epochs: Annotated[int, typer.Option(help="Epochs over the training images")] = 5,
    lr: Annotated[
        float | None, typer.Option(help="Maximum learning rate [1e-4; from scratch 1e-3]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images per training step")] = 128,
    mixup: Annotated[float, typer.Option(help="Alpha of timm's mixup; 0 for none")] = 0.0,
    smoothing: Annotated[float, typer.Option(help="Label smoothing")] = 0.1,
    augment: Annotated[
        str, typer.Option(help="Augmentation: auto, none, shift, shift-flip, crop or crop-flip")
    ] = "auto",
    seed: Seed = None,
    device: Device = None,
    out: Annotated[
        Path, typer.Option(help="Output folder; an interrupted training continues")
    ] = Path("trained"),
    cache: Cache = None,
) -> None:
    """Train a model, or a recipe on it, and save the weights, from which a search can start.

    \b
    vitpareto finetune --model vit_small_patch16_224 --data cifar10 --epochs 5 --out vit-s
    vitpareto finetune --model deit_small_patch16_224 --data /imagenet --recipe recipe.yaml
    vitpareto finetune --model deit_small_patch16_224 --data /imagenet --from-scratch --epochs 300
    """
    from vitpareto.methods import Recipe
    from vitpareto.search.measure.device import resolve_device
    from vitpareto.search.training.fine_tuning import FinetuneJob, finetune
    from vitpareto.search.training.settings import TrainingSettings

    settings = TrainingSettings(
        epochs=epochs,
        lr=lr if lr is not None else (1e-3 if from_scratch else 1e-4),
        batch=batch,
        smoothing=smoothing,
        mixup=mixup,
        augment=augment,
        seed=seed or 0,
        distill=distill,
        # from scratch no part of the model is newer than the rest
        parts_scale=1.0 if from_scratch else TrainingSettings.parts_scale,
    )
    job = FinetuneJob(
        model or "digits",
        data or "digits",
        out,
        settings,
        cache_folder(cache),
        resolve_device(device or "auto"),
        read_recipe(recipe) if recipe is not None else Recipe(),
        Path(weights) if weights else None,
        from_scratch,
        teacher,
        teacher_weights,
    )
    begin = time.monotonic()
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
    typer.echo(f"weights: {out / 'model.safetensors'}")
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
