"""`schema`: the JSON Schema of a job file, with which editors check and complete it."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command("schema")(schema_command)


def schema_command(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of job keys instead")
    ] = False,
) -> None:
    """Print the JSON Schema of a job file, for editors.

    \b
    vitpareto schema > job.schema.json
    vitpareto schema --markdown
    """
    from vitpareto.search.study.job_schema import job_schema, markdown_table

    typer.echo(
        markdown_table() if markdown else json.dumps(job_schema(), indent=2), nl=not markdown
    )
