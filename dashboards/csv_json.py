"""Rows as CSV and as JSON lines, for `--csv` and `--json`. Knows nothing of what the rows hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol


class Row(Protocol):
    """A record with named columns."""

    def to_json(self) -> dict[str, Any]:
        """The columns as plain values, in order."""


def json_lines(rows: Iterable[Row]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(row.to_json()) + "\n" for row in rows)


def csv_text(rows: Sequence[Row]) -> str:
    """CSV with a header line. Empty if there are no rows."""
    if not rows:
        return ""
    plain = [row.to_json() for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(plain[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return out.getvalue()
