"""`StudyPresenter`: pictures, verdict and tables of a study, also for the commands of `search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vitpareto.search.commands.inputs import cache_folder
from vitpareto.search.commands.terminal import console, log

if TYPE_CHECKING:
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.front_table import FrontRow
    from vitpareto.search.tracking.page import StudyPage


class StudyPresenter:
    """Shows a study at the end of a command (`search.commands.hooks.Presenter`)."""

    def page(self, folder: StudyFolder, cache: str | None = None) -> StudyPage:
        """Draw explorer, front and token pictures into the study's folder."""
        from vitpareto.search.study.front_table import study_front_rows
        from vitpareto.search.tracking.page import StudyPage

        if not any(r.state == "finished" for r in folder.measured()):
            return StudyPage({}, [])
        explorer, tokens = write_study_explorer(folder, folder.folder / "explorer.html", cache)
        fronts = [draw_front(folder, folder.folder / f"front.{kind}") for kind in ("png", "svg")]
        return StudyPage(
            {explorer.name: explorer, **{path.name: path for path in fronts},
             **{f"tokens/{path.name}": path for path in tokens.values()}},
            study_front_rows(folder),
        )  # fmt: skip

    def show(self, folder: StudyFolder, page: StudyPage) -> None:
        """Log where the pictures are, and print the verdict and the fronts."""
        for name, path in page.artifacts.items():
            if "/" not in name:
                log(f"{'explorer' if path.suffix == '.html' else 'plot'}: {path}")
        print_fronts(folder, page.table)


def write_study_explorer(
    folder: StudyFolder, path: Path, cache: str | None
) -> tuple[Path, Mapping[int, Path]]:
    """Write the explorer to `path`. Returns the path, and its token pictures by trial."""
    from vitpareto.dashboards.explorer_page import write_explorer
    from vitpareto.dashboards.study_token_pictures import token_pictures

    tokens = token_pictures(folder, cache_folder(cache or folder.job().cache))
    return write_explorer([folder], path, {folder.name: tokens}), tokens


def draw_front(folder: StudyFolder, path: Path) -> Path:
    """Draw the front and the recovered front to a file; returns its path."""
    from vitpareto.dashboards.front_plot import plot_front
    from vitpareto.search.study.certificates import measured

    return plot_front(
        measured(folder),
        objectives=folder.objectives[:2],
        title=title_of(folder),
        path=path,
        recovered=measured(folder, recovered=True),
    )


def title_of(folder: StudyFolder) -> str:
    job = folder.job()
    return f"{folder.name}: {job.model} on {job.data}"


def verdict_of(folder: StudyFolder, max_gmacs: float | None = None) -> str:
    """What pruning gains at a budget in GMACs (None: the knee's cost), in one sentence."""
    from vitpareto.search.study.certificates import measured
    from vitpareto.search.study.verdict import verdict

    found = verdict(measured(folder), folder.objectives, max_gmacs)
    return "No pruned model has been measured in full yet" if found is None else str(found)


def print_fronts(
    folder: StudyFolder, rows: Sequence[FrontRow], max_gmacs: float | None = None
) -> None:
    """Print the verdict and the tables of the front and of the recovered front."""
    typer.echo(verdict_of(folder, max_gmacs))
    for recovered in (False, True):
        chosen = [r for r in rows if r.recovered == recovered]
        if chosen:
            _print_front(folder, chosen)


def _print_front(folder: StudyFolder, rows: Sequence[FrontRow]) -> None:
    from vitpareto.dashboards.tables import damage_table, front_table
    from vitpareto.search.study.certificates import measured, order_note, why_not
    from vitpareto.search.study.front import front_of
    from vitpareto.search.study.objectives import objectives_named

    tables = console()
    tables.print(front_table(rows, _front_title(folder, rows)))
    if (damage := damage_table(rows, _damage_title(rows))) is not None:
        tables.print()
        tables.print(damage)
    recovered = rows[0].recovered
    front = front_of(measured(folder, recovered), objectives_named(folder.objectives))
    for note in (order_note(front), "" if recovered else why_not(folder, front)):
        if note:
            typer.echo(note)


def _front_title(folder: StudyFolder, rows: Sequence[FrontRow]) -> str:
    notes = ["* knee"] if any(r.knee for r in rows) else []
    if images := _certified_images(rows):
        notes.append(f"{images} held-out images; 95 %, all: holds for all certified trials at once")
    if target := next((r.latency_target for r in rows if r.latency_target), None):
        notes.append(f"ms: {target.device}, {target.dtype}, batch {target.batch}")
    kind, recovery = "front", folder.recovery.settings()
    if rows[0].recovered and recovery is not None:
        kind = "recovered front"
        notes.append(f"epochs {recovery.training.epochs}, {recovery.training.distill} distillation")
    return f"{kind} of {title_of(folder)}" + (f" ({'; '.join(notes)})" if notes else "")


def _damage_title(rows: Sequence[FrontRow]) -> str:
    splits = {r.flips_of for r in rows if r.flips_of}
    if splits == {"held-out"}:
        return f"against the dense model, on {_certified_images(rows)} held-out images"
    return f"against the dense model, on {' or '.join(sorted(splits))} images"


def _certified_images(rows: Sequence[FrontRow]) -> int | None:
    return next((r.certified_images for r in rows if r.certified_images), None)
