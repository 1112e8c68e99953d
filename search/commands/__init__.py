"""The commands of `search`: search, demo, recover, measure, export and what belongs to them.

Commands parse, call and print. They import the other rooms of `search` when they run, so that
`vitpareto --help` starts at once. May import all of `search`, not `clusters` or `dashboards`: the
root passes in what these contribute (`hooks`).
"""

from __future__ import annotations

import typer

from vitpareto.search.commands import (
    export,
    finetune,
    measure,
    methods,
    profile,
    recover,
    schema,
    search,
    sync,
)
from vitpareto.search.commands.hooks import Clusters, Presenter


def add_to(app: typer.Typer, clusters: Clusters, presenter: Presenter) -> None:
    """Add this package's commands."""
    search.add_to(app, clusters, presenter)
    recover.add_to(app, clusters, presenter)
    sync.add_to(app, presenter)
    for group in (measure, export, profile, methods, finetune, schema):
        group.add_to(app)
