"""`profile`: measure a latency table of a model's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitpareto.search.commands.inputs import check_parent, job_value, job_values
from vitpareto.search.commands.options import job_option, with_job_options
from vitpareto.search.commands.progress_display import ProgressDisplay
from vitpareto.search.commands.terminal import log


def add_to(app: typer.Typer) -> None:
    app.command("profile")(profile_command)


@with_job_options("model", "device", "dtype")
def profile_command(
    out: Annotated[Path, typer.Option(help="Table to write: FILE.json")],
    batch: Annotated[int | None, job_option("latency_batch")] = None,
    points: Annotated[int, typer.Option(help="Grid points per dimension")] = 3,
    rounds: Annotated[int, typer.Option(help="Calls per grid point; the median counts")] = 20,
    **options: Any,
) -> None:
    """Measure a latency table of a model's blocks on this device, for NViT (search --profile).

    \b
    vitpareto profile --model deit_base_distilled_patch16_224 --device cuda --batch 256 --out h.json
    """
    from vitpareto.search.measure.accuracy import DTYPES
    from vitpareto.search.measure.block_timing import measure_latency_table
    from vitpareto.search.measure.device import resolve_device
    from vitpareto.search.models.loading import fresh_model

    check_parent("--out", out)
    given = job_values(options)
    with ProgressDisplay() as display:
        table = measure_latency_table(
            fresh_model(given["model"]),
            given["model"],
            batch=job_value("latency_batch", batch, "--batch"),
            device=resolve_device(given["device"]),
            dtype=DTYPES[given["dtype"]],
            points=points,
            rounds=rounds,
            progress=display.counter("timing blocks"),
        )
    table.save(out)
    entries = sum(grid.ms.size for grid in (table.attention, table.mlp, table.rest))
    log(f"{entries} latencies of {given['model']} on {table.target}")
    typer.echo(str(out))
