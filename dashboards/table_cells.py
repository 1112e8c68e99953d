"""Columns and cells that the tables for a terminal share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A column of a table. Columns of numbers do not wrap, so that no number is cut."""

    name: str
    justify: Literal["left", "right"] = "left"
    wrap: bool = False
    min_width: int | None = None


def new_table(title: str, *columns: Column) -> Table:
    """A table without rows."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(
            column.name,
            justify=column.justify,
            no_wrap=not column.wrap,
            overflow="fold",
            min_width=column.min_width,
        )
    return table


def number_text(value: float | None, spec: str, missing: str = "") -> str:
    """A number in a format, or `missing` for None."""
    return missing if value is None else format(value, spec)


def interval_text(low: float | None, high: float | None, spec: str, to: str = "–") -> str:
    """An interval, for example `1.2–1.4`; empty if an end is None."""
    return "" if low is None or high is None else f"{low:{spec}}{to}{high:{spec}}"
