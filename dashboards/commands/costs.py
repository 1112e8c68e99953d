"""`table` and `reproduce`: costs of methods side by side, and beside published figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpareto.search.commands.inputs import cache_folder, job_values
from vitpareto.search.commands.options import AsCsv, AsJson, with_job_options
from vitpareto.search.commands.progress_display import ProgressDisplay
from vitpareto.search.commands.terminal import log, numbers, print_tables, words

if TYPE_CHECKING:
    from vitpareto.dashboards.csv_json import Row
    from vitpareto.search.compare.reproduction import ReproducedRow


def add_to(app: typer.Typer) -> None:
    app.command("table")(table_command)
    app.command("reproduce")(reproduce_command)


@with_job_options("batch", "device", "dtype")
def table_command(
    models: Annotated[
        str, typer.Option(help="timm names or digits, separated by commas")
    ] = "digits",
    methods: Annotated[
        str | None, typer.Option(help="Methods, for example tram,topk [all]")
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Fractions of tokens kept at each prune layer")
    ] = "0.75,0.5",
    rounds: Annotated[
        int, typer.Option(help="Rounds of paired timing; 0 for closed forms only")
    ] = 30,
    check: Annotated[bool, typer.Option("--check", help="Count with fvcore too")] = False,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Compare GMACs, parameters, images per second and memory of methods, without data or weights.

    \b
    vitpareto table --models vit_small_patch16_224,vit_base_patch16_224 --methods tram,topk,tome
    vitpareto table --models deit_small_patch16_224 --rates 0.7 --rounds 0
    """
    from vitpareto import methods as registry
    from vitpareto.dashboards.cost_tables import cost_notes, cost_records, cost_tables
    from vitpareto.search.compare.cost_table import CostSettings, cost_rows
    from vitpareto.search.measure.device import resolve_device

    given = job_values(options)
    device = resolve_device(given["device"])
    bench = CostSettings(given["batch"], device, given["dtype"], rounds, check, log)
    chosen = registry.names() if methods is None else words(methods)
    rows = list(cost_rows(words(models), chosen, numbers(rates, "--rates"), bench))
    if as_csv or as_json:
        _print_records(cost_records(rows), as_csv)
    else:
        print_tables(cost_tables(rows), cost_notes(rows))


@with_job_options("device", "dtype", "batch", "cache")
def reproduce_command(
    data: Annotated[
        str | None, typer.Option(help="Folder of ImageNet-1k's validation images")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Models of the rows, separated by commas [all]")
    ] = None,
    weights_dir: Annotated[
        Path | None,
        typer.Option(help="Folder with TIMM_TAG.safetensors or .pth [timm downloads]"),
    ] = None,
    as_csv: AsCsv = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Print published figures beside ours: GFLOPs, and top-1 of untrained methods if --data is
    given.

    \b
    vitpareto reproduce
    vitpareto reproduce --data /imagenet/val --models vit_small_patch16_224
    """
    from vitpareto.dashboards import published_tables
    from vitpareto.search.compare import published
    from vitpareto.search.compare.reproduction import EvaluationSetup, reproduce, select
    from vitpareto.search.measure.device import resolve_device

    given = job_values(options)
    rows = select(published.rows(), words(models or ""))
    with ProgressDisplay() as display:
        setup = None
        if data is None:
            log("top-1 is measured with --data FOLDER, ImageNet-1k's validation images")
        else:
            setup = EvaluationSetup(
                data, cache_folder(given["cache"]), weights_dir, resolve_device(given["device"]),
                given["dtype"], given["batch"], display.counter("decoding images"), display.count,
            )  # fmt: skip
        found = [_logged(row) for row in reproduce(rows, setup)]
    found.sort(key=lambda row: rows.index(row.row))
    if as_csv or as_json:
        _print_records(published_tables.figure_records(found), as_csv)
    else:
        tables = [published_tables.figures_table(found), published_tables.accuracy_table(found)]
        print_tables(tables, published_tables.figure_notes(found))


def _logged(row: ReproducedRow) -> ReproducedRow:
    """Log an accuracy as soon as it is measured: the other rows may take hours."""
    if row.accuracy is not None:
        log(f"{row.row.timm_tag} {row.row.label}: {row.accuracy.top1:.3f} %")
    return row


def _print_records(records: Sequence[Row], as_csv: bool) -> None:
    from vitpareto.dashboards.csv_json import csv_text, json_lines

    typer.echo(csv_text(records) if as_csv else json_lines(records), nl=False)
