"""What the tables of costs and of published figures share. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from vitpareto.dashboards.table_cells import Column, number_text
from vitpareto.search.measure.counting import COUNTERS

#: shown for a value that does not exist
NONE = "—"


def text_column(name: str) -> Column:
    """A column of words, which wrap."""
    return Column(name, wrap=True, min_width=10)


def number_column(name: str) -> Column:
    """A column of numbers, which do not wrap."""
    return Column(name, "right")


def number(value: float | None, spec: str) -> str:
    """A number in a format, or a dash for None."""
    return number_text(value, spec, missing=NONE)


def counter_notes(names: Iterable[str | None]) -> list[str]:
    """What the named conventions count."""
    known = set(names)
    return [f"counter {c.name}: {c.description}" for c in COUNTERS.values() if c.name in known]
