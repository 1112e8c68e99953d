"""Published figures next to those of this project, as tables and as records for CSV and JSON.

Renders the rows of `search.compare.reproduction`; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table

from vitpareto.dashboards.comparison_cells import (
    NONE,
    counter_notes,
    number,
    number_column,
    text_column,
)
from vitpareto.dashboards.table_cells import Column, new_table
from vitpareto.search.compare.reproduction import ReproducedRow, is_measurable


@dataclass(frozen=True, kw_only=True)
class FigureRecord:
    """A published row and its reproduction. The fields are the columns of CSV and JSON, in order.

    Accuracies are in percent, GFLOPs per image as `counter` counts them, `our_gmacs` in GMACs per
    image. `gflops_why` and `top1_why` are the reasons if a value of ours is missing; `images` is
    how many were evaluated, `unreadable` how many could not be decoded.
    """

    method: str
    model: str
    setting: Mapping[str, Any]
    source: str
    trained: bool
    counter: str | None
    gflops: float | None
    our_gflops: float | None
    gflops_why: str
    timm_tag: str | None
    top1: float | None
    our_top1: float | None
    our_top1_low: float | None
    our_top1_high: float | None
    dense_top1: float | None
    our_dense_top1: float | None
    our_gmacs: float | None
    images: int | None
    unreadable: int | None
    top1_why: str
    remark: str

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, keys in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def figure_records(reproduced: Sequence[ReproducedRow]) -> list[FigureRecord]:
    """One record per published row, for CSV and JSON."""
    return [_figure_record(row) for row in reproduced]


def _figure_record(reproduced: ReproducedRow) -> FigureRecord:
    row, ours = reproduced.row, reproduced.accuracy
    return FigureRecord(
        method=row.method,
        model=row.model,
        setting=row.setting,
        source=row.source,
        trained=row.trained,
        counter=row.counter,
        gflops=row.gflops,
        our_gflops=reproduced.gflops,
        gflops_why=_why_no_gflops(reproduced),
        timm_tag=row.timm_tag,
        top1=row.top1,
        our_top1=ours.top1 if ours else None,
        our_top1_low=ours.top1_low if ours else None,
        our_top1_high=ours.top1_high if ours else None,
        dense_top1=row.dense_top1,
        our_dense_top1=ours.dense_top1 if ours else None,
        our_gmacs=ours.gmacs if ours else None,
        images=ours.images if ours else None,
        unreadable=ours.unreadable if ours else None,
        top1_why="" if ours else f"not run: {reproduced.why}",
        remark=row.remark,
    )


def _why_no_gflops(reproduced: ReproducedRow) -> str:
    """Why the published cost is not recomputed; empty if it is."""
    if reproduced.gflops is not None:
        return ""
    if reproduced.row.gflops is None:
        return "not published"
    return reproduced.row.why or "its source names no counter"


def figures_table(reproduced: Sequence[ReproducedRow]) -> Table:
    """Published costs and ours, both in the convention of the source."""
    table = new_table(
        "published GFLOPs and ours, counted as the source counts",
        *map(text_column, ("source", "model", "method and setting")),
        Column("counter"),
        *map(number_column, ("theirs", "ours", "difference")),
    )
    for r in reproduced:
        row = r.row
        if row.gflops is None:
            continue
        change = None if r.gflops is None else r.gflops / row.gflops - 1
        table.add_row(
            row.source,
            row.model,
            row.label,
            row.counter or NONE,
            f"{row.gflops:.6g}",
            number(r.gflops, ".4f"),
            number(change, "+.2%"),
        )
    return table


def accuracy_table(reproduced: Sequence[ReproducedRow]) -> Table:
    """Published top-1 of methods without training, and ours with 95 % intervals."""
    table = new_table(
        "published ImageNet-1k top-1 without training, and ours",
        *map(text_column, ("source", "timm's weights", "method and setting")),
        number_column("theirs"),
        text_column("ours and its interval"),
        *map(number_column, ("difference", "dense theirs", "dense ours", "images")),
    )
    for r in reproduced:
        row = r.row
        if not is_measurable(row) or row.top1 is None:
            continue
        ours, difference, dense, images = _accuracy_cells(r, row.top1)
        table.add_row(
            row.source,
            row.timm_tag or row.model,
            row.label,
            f"{row.top1:.2f}",
            ours,
            difference,
            number(row.dense_top1, ".2f"),
            dense,
            images,
        )
    return table


def _accuracy_cells(reproduced: ReproducedRow, published_top1: float) -> tuple[str, str, str, str]:
    """Our top-1 with its interval, the difference, the dense model's top-1, and images."""
    ours = reproduced.accuracy
    if ours is None:
        return f"not run: {reproduced.why}", "", "", ""
    return (
        f"{ours.top1:.2f} ({ours.top1_low:.2f}–{ours.top1_high:.2f})",
        f"{ours.top1 - published_top1:+.2f}",
        f"{ours.dense_top1:.2f}",
        f"{ours.images}" + (f" (-{ours.unreadable})" if ours.unreadable else ""),
    )


def figure_notes(reproduced: Sequence[ReproducedRow]) -> list[str]:
    """The conventions, why some costs are not recomputed, and what explains differences."""
    notes = counter_notes(r.row.counter for r in reproduced if r.gflops is not None)
    missing = [r for r in reproduced if r.row.gflops is not None and r.gflops is None]
    notes += _grouped([(f"cost not recomputed: {_why_no_gflops(r)}", r) for r in missing])
    return notes + _grouped([(r.row.remark, r) for r in reproduced if r.row.remark])


def _grouped(notes: Sequence[tuple[str, ReproducedRow]]) -> list[str]:
    """One line per text, with the methods and models it is about."""
    lines = []
    for text in dict.fromkeys(text for text, _ in notes):
        rows = [r.row for other, r in notes if other == text]
        methods = ", ".join(dict.fromkeys(row.method for row in rows))
        models = ", ".join(dict.fromkeys(row.model for row in rows))
        lines.append(f"{methods} on {models}: {text}")
    return lines
