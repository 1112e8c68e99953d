"""What commands print: messages on standard error, tables and lists on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

#: width in characters of tables in a log or a pipe, and minimum width of tables of figures
WIDE = 160


def log(text: str) -> None:
    """Print a message for people."""
    typer.echo(text, err=True)


def console() -> Console:
    """The console for tables."""
    from rich.console import Console

    # a log or a pipe has no width; this one is wide enough for every recipe
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def print_tables(tables: Iterable[Any], notes: Iterable[str] = ()) -> None:
    """Print wide tables, an empty line after each, and notes below."""
    wide = console()
    wide.width = max(wide.width, WIDE)  # a narrow terminal folds lines instead of cutting numbers
    for table in tables:
        wide.print(table)
        wide.print()
    for note in notes:
        typer.echo(note)


def words(text: str) -> list[str]:
    """The items of a list separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, option: str) -> list[float]:
    """The numbers of a list separated by commas. Raises UserError."""
    from vitpareto.methods import Code
    from vitpareto.search.errors import UserError

    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise UserError(
            f"{option} must be numbers separated by commas, for example 0.75,0.5 (got {text!r})",
            Code.WRONG_TYPE,
            option=option,
            got=text,
        ) from None
