"""`front`, `trials`, `report` and `compare`: tables and pages of studies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitpareto.dashboards.commands.presenter import (
    draw_front,
    print_fronts,
    title_of,
    verdict_of,
    write_study_explorer,
)
from vitpareto.search.commands.inputs import check_parent, find_study
from vitpareto.search.commands.options import AsCsv, AsJson, Cache, Store
from vitpareto.search.commands.terminal import console, log

if TYPE_CHECKING:
    from vitpareto.search.study.folder import StudyFolder


def add_to(app: typer.Typer) -> None:
    app.command("front")(front_command)
    app.command("trials")(trials_command)
    app.command("report")(report_command)
    app.command("compare")(compare_command)


def front_command(
    name: Annotated[str, typer.Argument(help="Name of the study")],
    as_csv: AsCsv = False,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the front: FILE.png or FILE.svg")] = None,
    max_gmacs: Annotated[
        float | None,
        typer.Option(help="Budget of the verdict, GMACs per image [the knee's cost]"),
    ] = None,
    store: Store = None,
) -> None:
    """Print what pruning gains and the non-dominated trials of a study, cheapest first; also the
    recovered trials (see recover).

    \b
    vitpareto front deit-s
    vitpareto front deit-s --max-gmacs 3.2
    vitpareto front deit-s --csv > front.csv
    vitpareto front deit-s --plot front.svg
    """
    from vitpareto.dashboards.csv_json import csv_text, json_lines
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError
    from vitpareto.search.study.front_table import study_front_rows

    folder = find_study(store, name)
    if max_gmacs is not None and not 0 < max_gmacs < math.inf:
        raise UserError(
            f"--max-gmacs must be a number above 0 (got {max_gmacs:g})",
            Code.OUT_OF_RANGE,
            option="--max-gmacs",
            got=max_gmacs,
        )
    _check_suffix("--plot", plot, (".png", ".svg"))
    rows = study_front_rows(folder)
    if plot is not None:
        log(f"plot: {draw_front(folder, plot)}")
    if not rows:
        log(f"study {name} has no finished trial yet")
    elif as_csv or as_json:
        log(verdict_of(folder, max_gmacs))
        typer.echo(csv_text(rows) if as_csv else json_lines(rows), nl=False)
    else:
        print_fronts(folder, rows, max_gmacs)


def trials_command(
    name: Annotated[str, typer.Argument(help="Name of the study")],
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Print every trial of a study: finished, raced_out, failed (with the reason) and running.

    \b
    vitpareto trials deit-s --json
    """
    from vitpareto.dashboards.csv_json import json_lines
    from vitpareto.dashboards.tables import trial_table
    from vitpareto.search.study.optuna_trials import running_trials
    from vitpareto.search.study.trial_table import trial_rows

    folder = find_study(store, name)
    results = sorted([*folder.measured(), *running_trials(folder)], key=lambda r: r.trial)
    if as_json:
        typer.echo(json_lines(trial_rows(results)), nl=False)
    else:
        console().print(trial_table(results, f"{len(results)} trials of {title_of(folder)}"))


def report_command(
    name: Annotated[str, typer.Argument(help="Name of the study")],
    out: Annotated[
        Path | None, typer.Option(help="FILE.html [explorer.html in the study's folder]")
    ] = None,
    store: Store = None,
    cache: Cache = None,
) -> None:
    """Write the study as one page to explore: front, trials, recipes side by side, and the image
    patches that they keep. One HTML file that works offline.

    \b
    vitpareto report deit-s --out deit-s.html
    """
    folder = find_study(store, name)
    path = _page_path(out or folder.folder / "explorer.html")
    _check_measured(folder)
    typer.echo(verdict_of(folder))
    typer.echo(f"explorer: {write_study_explorer(folder, path, cache)[0]}")


def compare_command(
    names: Annotated[list[str], typer.Argument(help="Two or more studies", metavar="STUDY…")],
    out: Annotated[Path, typer.Option(help="FILE.html")] = Path("compare.html"),
    store: Store = None,
) -> None:
    """Write the fronts of several studies on one page, like report.

    \b
    vitpareto compare deit-s deit-s-trained --out compare.html
    """
    from vitpareto.dashboards.explorer_page import write_explorer
    from vitpareto.dashboards.tables import studies_table
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    path, folders = _page_path(out), [find_study(store, name) for name in dict.fromkeys(names)]
    if len(folders) < 2:
        raise UserError(
            f"compare requires two or more studies (got {', '.join(dict.fromkeys(names))})",
            Code.OUT_OF_RANGE,
            name="studies",
            got=len(folders),
        )
    for folder in folders:
        _check_measured(folder)
    console().print(studies_table(folders))
    typer.echo(f"explorer: {write_explorer(folders, path)}")


def _check_measured(folder: StudyFolder) -> None:
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    if not any(r.state == "finished" for r in folder.measured()):
        raise UserError(
            f"study {folder.name} has no trial that was measured in full yet",
            Code.EMPTY,
            study=folder.name,
        )


def _check_suffix(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    if path is not None and path.suffix.lower() not in suffixes:
        rule = " or ".join(f"FILE{suffix}" for suffix in suffixes)
        raise UserError(
            f"{option} must be {rule} (got {str(path)!r})",
            Code.WRONG_TYPE,
            option=option,
            got=str(path),
        )


def _page_path(path: Path) -> Path:
    _check_suffix("--out", path, (".html",))
    check_parent("--out", path)
    return path
