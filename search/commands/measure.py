"""`measure`: measure one recipe beside the dense model, in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vitpareto.search.commands import options as o
from vitpareto.search.commands.inputs import (
    check_recipe_or_trial,
    find_study,
    read_recipe,
    read_weights,
)
from vitpareto.search.commands.progress_display import ProgressDisplay
from vitpareto.search.study.job_keys import KEYS

if TYPE_CHECKING:
    from vitpareto.methods import Recipe
    from vitpareto.search.measure.latency import Latency
    from vitpareto.search.study.job_request import JobRequest
    from vitpareto.search.study.results import TrialResult

#: job keys that decide how a recipe is measured; a trial has its study's, options override them
MEASURED = tuple(key.name for key in KEYS.values() if key.measured)


@dataclass(frozen=True)
class Chosen:
    """What is measured.

    Attributes:
        recipe: of a file or of a trial.
        job: of the trial's study.
        trained: the weights that the recipe names, as a state dict; None if it names none.
    """

    recipe: Recipe
    job: JobRequest
    trained: Mapping[str, Any] | None


def add_to(app: typer.Typer) -> None:
    app.command("measure")(measure_command)


@o.with_job_options(*MEASURED)
def measure_command(
    recipe: o.RecipeFile = None,
    study: o.Study = None,
    trial: o.Trial = None,
    trained: o.Trained = None,
    as_json: o.AsJson = False,
    store: o.Store = None,
    **options: Any,
) -> None:
    """Measure one recipe, or one trial of a study again, beside the dense model.

    \b
    vitpareto measure --model deit_small_patch16_224 --data /imagenet/val --recipe recipe.yaml
    vitpareto measure --study deit-s --trial 12
    """
    from vitpareto.search.trials.single_measurement import measure_once

    chosen = _chosen(recipe, study, trial, trained, store)
    config = chosen.job.only(MEASURED).config(**o.given(options))
    with ProgressDisplay() as display:
        measured = measure_once(
            config, chosen.recipe, decode=display.counter("decoding images"),
            trained=chosen.trained,
        )  # fmt: skip
    result, dense, timed = measured.result, measured.dense, measured.latency
    if as_json:
        typer.echo(json.dumps(_record(result, dense, timed)))
        return
    for label, text in _rows(result, dense, timed, config.batch):
        typer.echo(f"{label:<12} {text}")


def _chosen(
    recipe: Path | None, study: str | None, trial: int | None, trained: Path | None,
    store: str | None,
) -> Chosen:  # fmt: skip
    """The recipe of a file, or that of a trial. Raises UserError."""
    from vitpareto.methods import Code
    from vitpareto.search.compare.trace_request import TraceRequest
    from vitpareto.search.errors import UserError
    from vitpareto.search.study.job_request import JobRequest

    check_recipe_or_trial(recipe, study, trial)
    if recipe is not None:
        return Chosen(read_recipe(recipe), JobRequest(), read_weights(trained))
    assert study is not None and trial is not None
    if trained is not None:
        raise UserError(
            "--trained requires --recipe: the weights of a trial are in its study",
            Code.CONFLICT,
            options=("--trained", "--study"),
        )
    folder = find_study(store, study)
    asked = TraceRequest.of_trial(folder, trial)
    return Chosen(asked.recipe, folder.job().changed(weights=str(folder.weights)), asked.trained)


def _record(result: TrialResult, dense: TrialResult, timed: Latency) -> dict[str, Any]:
    """What --json prints."""
    return {
        "recipe": result.rebuilt_from.to_json(),
        **{k: round(v, 6) for k, v in result.values.items()},
        "top1_low": result.top1_low,
        "top1_high": result.top1_high,
        "images": result.images,
        "dense_top1": dense.values["top1"],
        "dense_gmacs": dense.values["gmacs"],
        "latency_ms": timed.p50_ms,
        "latency_p95_ms": timed.p95_ms,
        "dense_latency_ms": timed.dense_p50_ms,
        "speedup": timed.speedup,
        "speedup_low": timed.speedup_low,
        "speedup_high": timed.speedup_high,
        "latency_target": timed.target.to_json(),
    }


def _rows(
    result: TrialResult, dense: TrialResult, timed: Latency, batch: int
) -> tuple[tuple[str, str], ...]:
    """Labels and texts for people."""

    v, d = result.values, dense.values
    target = str(timed.target)
    return (
        ("recipe", str(result.rebuilt_from)),
        ("top-1", f"{v['top1']:.2f} % ({result.top1_low:.2f}–{result.top1_high:.2f}, "
                  f"{result.images} images); dense {d['top1']:.2f} %"),
        ("top-5", f"{v['top5']:.2f} %; dense {d['top5']:.2f} %"),
        ("GMACs", f"{v['gmacs']:.4g} ({v['gmacs'] / d['gmacs']:.1%} of dense {d['gmacs']:.4g})"),
        ("parameters", f"{v['params_m']:.4g} M"),
        ("peak memory", f"{v['peak_mb']:.4g} MB at batch {batch}; dense {d['peak_mb']:.4g}"),
        ("latency", f"p50 {timed.p50_ms:.3g} ms, p95 {timed.p95_ms:.3g}; "
                    f"dense {timed.dense_p50_ms:.3g} ({target})"),
        ("speed-up", f"{timed.speedup:.2f} ({timed.speedup_low:.2f}–{timed.speedup_high:.2f})"),
    )  # fmt: skip
