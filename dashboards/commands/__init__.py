"""The commands of `dashboards`: what prints tables, draws or serves pages, and `StudyPresenter`,
with which a search shows its study.

May import all of `dashboards` and `search`, and not `clusters`. Modules are imported when a command
runs, so that `vitpareto --help` starts at once.
"""

from __future__ import annotations

import typer

from vitpareto.dashboards.commands import bench, costs, show, studies, ui


def add_to(app: typer.Typer) -> None:
    """Add this package's commands."""
    for group in (studies, show, costs, bench, ui):
        group.add_to(app)
