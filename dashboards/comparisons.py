"""Costs side by side, and published figures beside ours: for a terminal and as plain rows.

Only arranges what `search.compare.cost_table` and `search.compare.reproduction` found; nothing is
computed here but the difference of two shown numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.table import Table

from vitpareto.search.compare.cost_table import AT_MOST, GIVEN, KEPT, NEAREST, CostRow
from vitpareto.search.compare.reproduction import ReproducedRow, is_measurable
from vitpareto.search.measure.counting import COUNTERS

NONE = "—"

#: columns of words
WORDS = (
    *("source", "model", "timm's weights", "method and setting", "ours and its interval"),
    *("published GFLOPs", "recipe"),
)

RULES = {
    KEPT: "the method's published layers, this rate at each",
    NEAREST: "no rate in the method: the setting in its space whose MACs come nearest to TopK's",
    AT_MOST: "images decide: the most it may cost comes nearest to TopK's",
    GIVEN: "images would decide the counts: it is given TopK's",
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
    """One table a model; speed-up intervals are 95 %."""
    return [
        _cost_table(model, [row for row in rows if row.model == model])
        for model in dict.fromkeys(row.model for row in rows)
    ]


def _cost_table(model: str, rows: Sequence[CostRow]) -> Table:
    checked = any(row.fvcore_gmacs is not None for row in rows)
    target = next((row.target for row in rows if row.target), None)
    title = f"{model}, fresh weights (no figure here depends on them)"
    if target:
        title += f"; {target}"
    table = _table(
        title,
        ("method", "left"), ("rate", "right"), ("GMACs", "right"),
        *([("fvcore", "right")] if checked else []),
        ("of dense", "right"), ("M par.", "right"), ("FPS", "right"), ("speed-up", "left"),
        ("peak MB", "right"), ("published GFLOPs", "left"), ("recipe", "left"),
    )  # fmt: skip
    for row in rows:
        gmacs = _shown(row.gmacs, ".4g")
        if row.gmacs is None and row.gmacs_high is not None:
            gmacs = f"<= {row.gmacs_high:.4g}"
        speedup = _shown(row.speedup, ".2f")
        if row.speedup is not None:
            speedup += f" {row.speedup_low:.2f}–{row.speedup_high:.2f}"
        table.add_row(
            row.method,
            "" if row.rate is None else f"{row.rate:g}",
            gmacs,
            *([_shown(row.fvcore_gmacs, ".4g")] if checked else []),
            _shown(row.share, ".1%"),
            _shown(row.params_m, ".4g"),
            _shown(row.images_per_s, ".4g"),
            speedup,
            _shown(row.peak_mb, ".4g"),
            _published(row, exact=False),
            "; ".join(part for part in (row.recipe, row.note) if part),
        )
    return table


def cost_notes(rows: Sequence[CostRow]) -> list[str]:
    """How each method's setting was found, and in which convention published figures count."""
    notes = []
    for rule, meaning in RULES.items():
        found = list(dict.fromkeys(row.method for row in rows if row.rule == rule))
        if found:
            notes.append(f"{rule} ({', '.join(found)}): {meaning}")
    others = [(f.remark, row) for row in rows for f in row.published if f.differs]
    for remark in dict.fromkeys(remark for remark, _ in others):
        about = ", ".join(dict.fromkeys(row.method for said, row in others if said == remark))
        on = ", ".join(dict.fromkeys(row.model for said, row in others if said == remark))
        notes.append(f"published of another model ({about} on {on}): {remark}")
    return notes + _conventions({f.counter for row in rows for f in row.published})


def _published(row: CostRow, exact: bool) -> str:
    parts = []
    for f in row.published:
        ours = NONE if f.ours is None else f"{f.ours:.6g}" if exact else f"{f.ours:.4g}"
        theirs = f"{f.gflops:.6g}" if exact else f"{f.gflops:.4g}"
        differs = f", both of a model with {f.differs}" if f.differs else ""
        parts.append(f"{theirs} {f.counter} (ours {ours}){differs}")
    return "; ".join(parts)


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
    return [_figure_record(one) for one in reproduced]


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
        gflops_why=_cost_why(reproduced),
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


def _cost_why(one: ReproducedRow) -> str:
    if one.gflops is not None:
        return ""
    if one.row.gflops is None:
        return "not published"
    return one.row.why or "its source names no counter"


def figures_table(found: Sequence[ReproducedRow]) -> Table:
    """Published costs beside ours, each in its source's convention."""
    table = _table(
        "published GFLOPs beside ours, counted as the source counts",
        ("source", "left"), ("model", "left"), ("method and setting", "left"),
        ("counter", "left"), ("theirs", "right"), ("ours", "right"), ("difference", "right"),
    )  # fmt: skip
    for one in found:
        row = one.row
        if row.gflops is None:
            continue
        change = None if one.gflops is None else one.gflops / row.gflops - 1
        table.add_row(
            row.source, row.model, row.label, row.counter or NONE, f"{row.gflops:.6g}",
            _shown(one.gflops, ".4f"), _shown(change, "+.2%"),
        )  # fmt: skip
    return table


def accuracy_table(found: Sequence[ReproducedRow]) -> Table:
    """Published top-1 of untrained methods beside ours; intervals are 95 %."""
    table = _table(
        "published ImageNet-1k top-1, untrained, beside ours",
        ("source", "left"), ("timm's weights", "left"), ("method and setting", "left"),
        ("theirs", "right"), ("ours and its interval", "left"), ("difference", "right"),
        ("dense theirs", "right"), ("dense ours", "right"), ("images", "right"),
    )  # fmt: skip
    for one in found:
        row, ours = one.row, one.accuracy
        if not is_measurable(row) or row.top1 is None:
            continue
        shown = (f"not run: {one.why}", "", "", "")
        if ours is not None:
            shown = (
                f"{ours.top1:.2f} ({ours.top1_low:.2f}–{ours.top1_high:.2f})",
                f"{ours.top1 - row.top1:+.2f}",
                f"{ours.dense_top1:.2f}",
                f"{ours.images}" + (f" (-{ours.unreadable})" if ours.unreadable else ""),
            )
        table.add_row(
            row.source, row.timm_tag or row.model, row.label, f"{row.top1:.2f}", *shown[:2],
            _shown(row.dense_top1, ".2f"), *shown[2:],
        )  # fmt: skip
    return table


def figure_notes(found: Sequence[ReproducedRow]) -> list[str]:
    """The conventions, why some costs are not recomputed, and what explains a difference."""
    notes = _conventions({one.row.counter for one in found if one.gflops is not None})
    left = [one for one in found if one.row.gflops is not None and one.gflops is None]
    notes += _grouped([(f"no cost of ours: {_cost_why(one)}", one) for one in left])
    return notes + _grouped([(one.row.remark, one) for one in found if one.row.remark])


def _grouped(said: Sequence[tuple[str, ReproducedRow]]) -> list[str]:
    """One line a text, with the methods and models it is about."""
    lines = []
    for text in dict.fromkeys(text for text, _ in said):
        rows = [one.row for other, one in said if other == text]
        about = ", ".join(dict.fromkeys(row.method for row in rows))
        models = ", ".join(dict.fromkeys(row.model for row in rows))
        lines.append(f"{about} on {models}: {text}")
    return lines


def _conventions(names: set[str | None]) -> list[str]:
    return [f"counter {c.name}: {c.says}" for c in COUNTERS.values() if c.name in names]


def _table(title: str, *columns: tuple[str, str]) -> Table:
    """Words wrap, numbers never: they would be cut."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name, justify in columns:
        wraps = name in WORDS
        table.add_column(
            name,
            justify=justify,  # type: ignore[arg-type]
            no_wrap=not wraps,
            overflow="fold",
            min_width=10 if wraps else None,
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
