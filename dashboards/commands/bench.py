"""`bench`: time the programs of a bundle beside the dense model's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitpareto.search.commands.inputs import job_value
from vitpareto.search.commands.options import AsJson, job_option
from vitpareto.search.commands.terminal import numbers, print_tables, words


def add_to(app: typer.Typer) -> None:
    app.command("bench")(bench_command)


def bench_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that export wrote")],
    runtimes: Annotated[
        str, typer.Option(help="onnxruntime, torch.export, torch.compile, separated by commas")
    ] = "onnxruntime,torch.export",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas")] = "1,32",
    rounds: Annotated[int, typer.Option(help="Rounds of paired timing")] = 30,
    device: Annotated[str | None, job_option("device", "cpu")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a bundle's programs in turn with the dense model's, exported the same way.

    \b
    vitpareto bench bundle/
    vitpareto bench bundle/ --runtimes onnxruntime --batches 1,8,64
    """
    from vitpareto.dashboards.bench_table import bench_rows, bench_table
    from vitpareto.dashboards.csv_json import json_lines
    from vitpareto.search.export.benchmark import bench_bundle
    from vitpareto.search.measure.device import resolve_device

    sizes = [int(n) for n in numbers(batches, "--batches")]
    found = bench_bundle(
        bundle, runtimes=words(runtimes), batches=sizes,
        device=resolve_device(job_value("device", device or "cpu")), rounds=rounds,
    )  # fmt: skip
    if as_json:
        typer.echo(json_lines(bench_rows(found)), nl=False)
    else:
        print_tables([bench_table(found, str(bundle))])
