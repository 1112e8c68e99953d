"""Options of the command line that come from job keys, so that each is described once.

Imports typer and the declarations of job keys: nothing heavy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from vitpareto.search.study.job_keys import KEYS
from vitpareto.search.study.key_kinds import Entries

Command = TypeVar("Command", bound=Callable[..., None])


def job_option(name: str, default: str = "") -> Any:
    """The option of a job key, with the key's help.

    Args:
        default: what the help names as the default, if that is not the key's.
    """
    key = KEYS[name]
    return typer.Option(help=f"{key.help} [{default or key.shown_default}]")


TrackingUri = Annotated[str | None, job_option("tracking_uri")]
Store = Annotated[str | None, job_option("store")]
Cache = Annotated[str | None, job_option("cache")]

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE for any job key, for example trials=400"),
]
Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a Ray head, or auto on its nodes [Ray on this machine]"),
]
RecipeFile = Annotated[Path | None, typer.Option(help="Recipe file (YAML)")]
Trained = Annotated[
    Path | None,
    typer.Option(help="Weights that the recipe names: .safetensors, or .pth with tensors only"),
]
Study = Annotated[str | None, typer.Option(help="Study whose trial is used instead of --recipe")]
Trial = Annotated[int | None, typer.Option(help="Number of the trial, with --study")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV")]


def with_job_options(*names: str) -> Callable[[Command], Command]:
    """Replace a command's `**options` by one option for each of these job keys, None by default.

    `space` and `fixed` are mappings: `--set` gives their entries.
    """
    options = [
        inspect.Parameter(
            key.name, inspect.Parameter.KEYWORD_ONLY, default=None,
            annotation=Annotated[key.kind.python | None, job_option(key.name)],
        )
        for key in map(KEYS.__getitem__, names)
        if not isinstance(key.kind, Entries)
    ]  # fmt: skip

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return command

    return decorate


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
