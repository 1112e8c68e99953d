"""`profile`: measure a latency table of a model's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpareto.search.commands.options import Device, Model
from vitpareto.search.commands.progress import ProgressDisplay
from vitpareto.search.commands.terminal import log


def add_to(app: typer.Typer) -> None:
    app.command("profile")(profile_command)


def profile_command(
    out: Annotated[Path, typer.Option(help="Table to write: FILE.json")],
    model: Model = None,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="Dtype: float32, bfloat16 or float16")] = "float32",
    batch: Annotated[
        int, typer.Option(help="Images per forward pass, as --latency-batch of the search")
    ] = 1,
    points: Annotated[int, typer.Option(help="Grid points per dimension")] = 3,
    rounds: Annotated[int, typer.Option(help="Calls per grid point; the median counts")] = 20,
) -> None:
    """Measure a latency table of a model's blocks on this device, for NViT (search --profile).

    \b
    vitpareto profile --model deit_base_distilled_patch16_224 --device cuda --batch 256 --out h.json
    """
    from vitpareto.methods import Code
    from vitpareto.methods.engine.bad_input import nearest
    from vitpareto.search.errors import UserError
    from vitpareto.search.measure.accuracy import DTYPES
    from vitpareto.search.measure.block_timing import measure_latency_table
    from vitpareto.search.measure.device import resolve_device
    from vitpareto.search.models.loading import fresh_model

    if dtype not in DTYPES:
        raise UserError(
            f"--dtype must be one of {', '.join(DTYPES)} (got {dtype!r}){nearest(dtype, DTYPES)}",
            Code.OUT_OF_RANGE,
            option="--dtype",
            got=dtype,
        )
    if batch < 1:
        raise UserError(
            f"--batch must be at least 1 (got {batch})",
            Code.OUT_OF_RANGE,
            option="--batch",
            got=batch,
        )
    name = model or "digits"
    with ProgressDisplay() as display:
        table = measure_latency_table(
            fresh_model(name),
            name,
            batch=batch,
            device=resolve_device(device or "auto"),
            dtype=DTYPES[dtype],
            points=points,
            rounds=rounds,
            progress=display.counter("timing blocks"),
        )
    table.save(out)
    entries = sum(grid.ms.size for grid in (table.attention, table.mlp, table.rest))
    log(f"{entries} latencies of {name} on {table.target}")
    typer.echo(str(out))
