"""`sync`: make MLflow equal to a study."""

from __future__ import annotations

from typing import Annotated

import typer

from vitpareto.search.commands.hooks import Presenter
from vitpareto.search.commands.inputs import find_study
from vitpareto.search.commands.options import Store, TrackingUri
from vitpareto.search.commands.terminal import log


def add_to(app: typer.Typer, presenter: Presenter) -> None:
    @app.command("sync")
    def sync_command(
        name: Annotated[str, typer.Argument(help="Name of the study")],
        tracking_uri: TrackingUri = None,
        store: Store = None,
    ) -> None:
        """Update MLflow so that it matches a study.

        \b
        vitpareto sync deit-s --tracking-uri http://127.0.0.1:5000
        """
        from vitpareto.search.tracking.sync import sync

        folder = find_study(store, name)
        uri = tracking_uri or folder.job().tracking_uri
        report = sync(folder, "store" if uri == "none" else uri, presenter.page(folder))
        typer.echo(
            f"{report.created} runs created, {report.updated} updated, {report.closed} closed, "
            f"{report.removed} removed, {report.unchanged} unchanged"
        )
        for trial, reason in report.refused.items():
            log(f"refused: {'the study' if trial is None else f'trial {trial}'}: {reason}")
        if report.refused:
            raise typer.Exit(1)
