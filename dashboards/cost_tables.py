"""Costs of methods side by side, as tables for a terminal and as records for CSV and JSON.

Renders the rows of `search.compare.cost_table`; measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from vitpareto.dashboards.comparison_cells import (
    NONE,
    counter_notes,
    number,
    number_column,
    text_column,
)
from vitpareto.dashboards.table_cells import Column, interval_text, new_table
from vitpareto.search.compare.cost_table import CostRow
from vitpareto.search.compare.matched_settings import AT_MOST, GIVEN, KEPT, NEAREST

#: how a method's setting for a rate is found
RULES = {
    KEPT: "the published layers of the method, with this rate at each",
    NEAREST: "the method has no rate: the setting with the MACs closest to TopK's",
    AT_MOST: "MACs depend on the images: the setting with the maximum closest to TopK's MACs",
    GIVEN: "token counts depend on the images: TopK's counts are used",
}


@dataclass(frozen=True)
class CostRecord:
    """A row of the cost table for CSV and JSON.

    `published` becomes one text: `11.85 thop (ours 11.8506)`, followed by how the published model
    differs from the row's.
    """

    row: CostRow

    def to_json(self) -> dict[str, Any]:
        """The fields of `CostRow` as plain values, in order."""
        target = self.row.target
        return {
            **asdict(self.row),
            "published": _published(self.row, exact=True),
            "target": {} if target is None else target.to_json(),
        }


def cost_records(rows: Sequence[CostRow]) -> list[CostRecord]:
    """One record per row, for CSV and JSON."""
    return [CostRecord(row) for row in rows]


def cost_tables(rows: Sequence[CostRow]) -> list[Table]:
    """One table per model; intervals of speed-ups are 95 %."""
    return [
        _cost_table(model, [row for row in rows if row.model == model])
        for model in dict.fromkeys(row.model for row in rows)
    ]


def _cost_table(model: str, rows: Sequence[CostRow]) -> Table:
    checked = any(row.fvcore_gmacs is not None for row in rows)
    target = next((row.target for row in rows if row.target), None)
    table = new_table(
        f"{model}, random weights (costs do not depend on them)"
        + (f"; {target}" if target else ""),
        Column("method"),
        number_column("rate"),
        number_column("GMACs"),
        *([number_column("fvcore")] if checked else []),
        *map(number_column, ("of dense", "M par.", "FPS")),
        Column("speed-up"),
        number_column("peak MB"),
        *map(text_column, ("published GFLOPs", "recipe")),
    )
    for row in rows:
        table.add_row(*_cost_cells(row, checked))
    return table


def _cost_cells(row: CostRow, checked: bool) -> list[str]:
    gmacs = number(row.gmacs, ".4g")
    if row.gmacs is None and row.gmacs_high is not None:
        gmacs = f"<= {row.gmacs_high:.4g}"
    speedup = number(row.speedup, ".2f")
    interval = interval_text(row.speedup_low, row.speedup_high, ".2f")
    return [
        row.method,
        "" if row.rate is None else f"{row.rate:g}",
        gmacs,
        *([number(row.fvcore_gmacs, ".4g")] if checked else []),
        number(row.share, ".1%"),
        number(row.params_m, ".4g"),
        number(row.images_per_s, ".4g"),
        f"{speedup} {interval}".strip(),
        number(row.peak_mb, ".4g"),
        _published(row, exact=False),
        "; ".join(part for part in (row.recipe, row.note) if part),
    ]


def cost_notes(rows: Sequence[CostRow]) -> list[str]:
    """How each method's setting was found, and what the published figures count."""
    notes = []
    for rule, meaning in RULES.items():
        methods = list(dict.fromkeys(row.method for row in rows if row.rule == rule))
        if methods:
            notes.append(f"{rule} ({', '.join(methods)}): {meaning}")
    remarks = [(f.remark, row) for row in rows for f in row.published if f.differs]
    for remark in dict.fromkeys(remark for remark, _ in remarks):
        about = [row for other, row in remarks if other == remark]
        methods = list(dict.fromkeys(row.method for row in about))
        models = list(dict.fromkeys(row.model for row in about))
        notes.append(
            f"published for another model ({', '.join(methods)} on {', '.join(models)}): {remark}"
        )
    return notes + counter_notes(f.counter for row in rows for f in row.published)


def _published(row: CostRow, exact: bool) -> str:
    """Published figures, each with this project's figure in the same convention."""
    parts = []
    for f in row.published:
        ours = NONE if f.ours is None else f"{f.ours:.6g}" if exact else f"{f.ours:.4g}"
        theirs = f"{f.gflops:.6g}" if exact else f"{f.gflops:.4g}"
        differs = f", both of a model with {f.differs}" if f.differs else ""
        parts.append(f"{theirs} {f.counter} (ours {ours}){differs}")
    return "; ".join(parts)
