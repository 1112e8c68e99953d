"""`ui`: serve MLflow on a store of studies, on loopback."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from vitpareto.search.commands.inputs import chosen_store, find_study
from vitpareto.search.commands.options import Store


def add_to(app: typer.Typer) -> None:
    app.command("ui")(ui_command)


def ui_command(
    name: Annotated[str | None, typer.Argument(help="Study to open")] = None,
    port: Annotated[int | None, typer.Option(help="Port [a free one]")] = None,
    store: Store = None,
) -> None:
    """Serve MLflow on the store, on loopback, until Ctrl-C; prints the addresses of the study's
    front, explorer and page.

    \b
    vitpareto ui deit-s
    """
    from vitpareto.dashboards.mlflow_server import serve

    if name is not None:
        find_study(store, name)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # the server must end with this process
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    with serve(Path(chosen_store(store)), name, port=port) as served:
        if name is not None:
            typer.echo(f"front: {served.view}")
            typer.echo(f"explorer: {served.explorer}")
            typer.echo(f"study: {served.page}")
        else:
            typer.echo(served.url)
        sys.stdout.flush()
        signal.pause()
