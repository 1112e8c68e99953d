"""Tables of a study for a terminal: its front, its trials, and several studies compared.

Renders rows that `search.study` computed. Intervals are 95 %; intervals on held-out images hold
for all certified trials at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vitpareto.dashboards.table_cells import Column, interval_text, new_table, number_text
from vitpareto.search.stats.pareto import hypervolume
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of, reference_point
from vitpareto.search.study.front_table import FrontRow
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES
from vitpareto.search.study.results import TrialResult


def front_table(rows: Sequence[FrontRow], title: str) -> Table:
    """The front. Recovered rows also show the accuracy before fine-tuning."""
    recovered = any(row.recovered for row in rows)
    certified = any(row.certified_top1 is not None for row in rows)
    timed = any(row.latency_ms is not None for row in rows)
    table = new_table(
        title,
        Column("trial", "right"),
        *([Column("before %", "right")] if recovered else ()),
        Column("search %", "right"),
        Column("95 %"),
        Column("vs dense", "right"),
        *([Column("held-out %", "right"), Column("95 %, all")] if certified else ()),
        Column("GMACs", "right"),
        Column("of dense", "right"),
        Column("M par.", "right"),
        *([Column("ms", "right"), Column("speed-up")] if timed else ()),
        Column("recipe", wrap=True),
    )
    for row in rows:
        speedup = [
            number_text(row.speedup, ".2f"),
            interval_text(row.speedup_low, row.speedup_high, ".2f"),
        ]
        table.add_row(
            f"{row.trial}{' *' if row.knee else ''}",
            *([number_text(row.top1_before, ".2f")] if recovered else ()),
            f"{row.top1:.2f}",
            interval_text(row.top1_low, row.top1_high, ".1f"),
            number_text(row.top1_change, "+.2f"),
            *(_certified_cells(row) if certified else ()),
            f"{row.gmacs:.4g}",
            number_text(row.gmacs_share, ".0%"),
            f"{row.params_m:.4g}",
            *((number_text(row.latency_ms, ".3g"), " ".join(speedup).strip()) if timed else ()),
            row.recipe,
        )
    return table


def _certified_cells(row: FrontRow) -> tuple[str, str]:
    return (
        number_text(row.certified_top1, ".2f"),
        interval_text(row.certified_top1_low, row.certified_top1_high, ".1f"),
    )


def damage_table(rows: Sequence[FrontRow], title: str) -> Table | None:
    """Per member of the front: images whose prediction changed, and the class that loses most.

    None if no member can be compared with the dense model.
    """
    compared = [
        row for row in rows if row.lost is not None and (row.recovered or not row.is_reference)
    ]
    if not compared:
        return None
    certified = any(row.certified_change is not None for row in compared)
    table = new_table(
        title,
        Column("trial", "right"),
        *([Column("vs dense", "right"), Column("95 %, all")] if certified else ()),
        Column("right to wrong", "right"),
        Column("wrong to right", "right"),
        *([Column("worst class"), Column("vs dense", "right"), Column("images", "right"),
           Column("")] if certified else ()),
    )  # fmt: skip
    for row in compared:
        change = (
            number_text(row.certified_change, "+.2f"),
            interval_text(row.certified_change_low, row.certified_change_high, "+.1f", " to "),
        )
        table.add_row(
            str(row.trial),
            *(change if certified else ()),
            str(row.lost),
            str(row.gained),
            *(_worst_class_cells(row) if certified else ()),
        )
    return table


def _worst_class_cells(row: FrontRow) -> tuple[str, str, str, str]:
    """Name, change in points, images, and whether the change is within noise."""
    drop = row.worst_class_drop
    if drop is None:
        return "", "", "", ""
    if drop <= 0:
        return "none", "", "", ""
    noise = "" if row.worst_class_beyond_noise else "within noise"
    return str(row.worst_class), f"{-drop:+.1f}", str(row.worst_class_images), noise


def trial_table(results: Sequence[TrialResult], title: str) -> Table:
    """All trials, with the reason of those that failed or were stopped."""
    right = ("trial", "top-1 %", "GMACs", "images", "s")
    table = new_table(
        title,
        *(
            Column(name, "right" if name in right else "left", wrap=True)
            for name in ("trial", "state", "top-1 %", "GMACs", "images", "s", "recipe", "reason")
        ),
    )
    for r in results:
        table.add_row(
            str(r.trial),
            r.state,
            number_text(r.values.get("top1"), ".2f"),
            number_text(r.values.get("gmacs"), ".4g"),
            str(r.images or ""),
            number_text(r.seconds or None, ".1f"),
            str(r.recipe),
            r.reason,
        )
    return table


def studies_table(folders: Sequence[StudyFolder]) -> Table:
    """Studies compared by size, front and knee.

    Hypervolumes can only be compared between studies of the same model and images.
    """
    table = new_table(
        "studies",
        *(Column(name) for name in ("study", "model", "images")),
        *(
            Column(name, "right")
            for name in (
                *("complete", "early", "front", "hypervolume", "dense %", "knee %"),
                "cost of knee",
            )
        ),
        Column("knee", wrap=True),
    )
    for folder in folders:
        table.add_row(*_study_cells(folder))
    return table


def _study_cells(folder: StudyFolder) -> list[str]:
    results, job = folder.measured(), folder.job()
    axes = [OBJECTIVES[o] for o in folder.objectives]
    front, dense = front_of(results, axes), reference_of(results)
    knee, volume = knee_of(front, axes, dense), ""
    if dense is not None:
        points = [[r.values[o.name] for o in axes] for r in front]
        reference = reference_point(dense.values, axes)
        volume = f"{hypervolume(points, reference, [o.sign for o in axes]):.4g}"
    cost = next((o for o in axes if o.name not in ACCURACIES), None)
    return [
        folder.name,
        job.model,
        job.data,
        str(sum(r.state == "finished" for r in results)),
        str(sum(r.state == "raced_out" for r in results)),
        str(len(front)),
        volume,
        "" if dense is None else f"{dense.values['top1']:.2f}",
        "" if knee is None else f"{knee.values['top1']:.2f}",
        "" if knee is None or cost is None else f"{knee.values[cost.name]:.4g} {cost.unit}",
        "" if knee is None else str(knee.recipe),
    ]
