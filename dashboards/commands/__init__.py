"""The commands of `dashboards`, which print tables, draw pictures and serve pages.

`StudyPresenter` shows a study at the end of a search. May import all of `dashboards` and `search`;
not `clusters`. Modules are imported when a command runs, so that `vitpareto --help` starts at once.
"""

from __future__ import annotations

import typer

from vitpareto.dashboards.commands import bench, costs, show, studies, ui


def add_to(app: typer.Typer) -> None:
    """Add this package's commands."""
    for group in (studies, show, costs, bench, ui):
        group.add_to(app)
