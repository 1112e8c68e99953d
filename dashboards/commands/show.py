"""`show`: draw which patches a recipe keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpareto.search.commands import options as o
from vitpareto.search.commands.inputs import (
    cache_folder,
    check_recipe_or_trial,
    find_study,
    job_values,
    read_recipe,
    read_weights,
)
from vitpareto.search.commands.progress_display import ProgressDisplay
from vitpareto.search.commands.terminal import log
from vitpareto.search.study.job_keys import KEYS

if TYPE_CHECKING:
    from vitpareto.search.compare.token_trace import TokenTrace
    from vitpareto.search.compare.trace_request import TraceRequest


def add_to(app: typer.Typer) -> None:
    app.command("show")(show_command)


@o.with_job_options("model", "weights", "data", "seed")
def show_command(
    files: Annotated[
        list[Path] | None, typer.Argument(help="More image files", metavar="FILE")
    ] = None,
    recipe: o.RecipeFile = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image file; may be repeated [the first images of the data]"),
    ] = None,
    study: o.Study = None,
    trial: o.Trial = None,
    trained: o.Trained = None,
    images: Annotated[
        int | None, typer.Option(help="Number of images of the data to draw [4]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Picture to write: FILE.png")] = Path("show.png"),
    as_json: o.AsJson = False,
    store: o.Store = None,
    cache: o.Cache = None,
    **options: Any,
) -> None:
    """Draw which patches of an image a recipe keeps, merges or drops at each stage.

    \b
    vitpareto show --recipe recipe.yaml --model deit_small_patch16_224 --image cat.jpg dog.jpg
    vitpareto show --study deit-s --trial 12 --out patches.png
    """
    from vitpareto.dashboards.token_picture import check_path, draw_patches
    from vitpareto.search.compare.show import trace_images

    check_path(out)
    check_recipe_or_trial(recipe, study, trial)
    if recipe is not None:
        request = _of_recipe(recipe, trained, options)
    else:
        decided = [KEYS[name].option for name in o.given(options)]
        decided += [] if trained is None else ["--trained"]
        request = _of_trial(study, trial, store, decided)
    with ProgressDisplay() as display:
        trace = trace_images(
            request, [*(image or []), *(files or [])], images=images, cache=cache_folder(cache),
            progress=display.counter("decoding images"),
        )  # fmt: skip
    for note in trace.notes:
        log(f"note: {note}")
    log(f"picture: {draw_patches(trace, out)}")
    _print_trace(trace, as_json)


def _of_recipe(recipe: Path, trained: Path | None, options: Mapping[str, Any]) -> TraceRequest:
    """A recipe file on a model, the embedded one by default."""
    from vitpareto.search.compare.trace_request import TraceRequest

    given = job_values(options)
    weights = Path(given["weights"]) if given["weights"] else None
    return TraceRequest(
        read_recipe(recipe), given["model"], weights, options["data"], given["seed"],
        trained=read_weights(trained),
    )  # fmt: skip


def _of_trial(
    study: str | None, trial: int | None, store: str | None, given: list[str]
) -> TraceRequest:
    """A trial of a study. Raises UserError if options are given that the study decides."""
    from vitpareto.methods import Code
    from vitpareto.search.compare.trace_request import TraceRequest
    from vitpareto.search.errors import UserError

    assert study is not None and trial is not None
    if given:
        raise UserError(
            f"{', '.join(given)} must not be given with --study: the study decides them",
            Code.CONFLICT,
            options=tuple(given),
        )
    return TraceRequest.of_trial(find_study(store, study), trial)


def _print_trace(trace: TokenTrace, as_json: bool) -> None:
    from vitpareto.dashboards.csv_json import json_lines
    from vitpareto.dashboards.token_rows import patch_rows, summary

    if as_json:
        typer.echo(json_lines(patch_rows(trace)), nl=False)
        return
    for image in trace.images:
        typer.echo(summary(image))
