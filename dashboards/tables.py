"""A study as tables: the front and all trials, for a terminal, as CSV and as JSON lines.

Only arranges what `search` measured; nothing is computed here that a result does not hold.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from methods import Recipe
from search.pareto import front_of, knee_of, reference_of
from search.results import OBJECTIVES, Latency, TrialResult


def front_rows(
    results: Sequence[TrialResult],
    latencies: dict[int, Latency],
    objectives: Sequence[str],
    before: Sequence[TrialResult] | None = None,
) -> list[dict[str, Any]]:
    """The front, cheapest first: one plain dict a member (percent, G, M, ms, MB).

    before: for results that were recovered, the study's own, whose dense model they are compared
    with; `top1_before` is the same trial's top-1 among them.
    """
    axes = [OBJECTIVES[o] for o in objectives]
    front, dense = front_of(results, axes), reference_of(results if before is None else before)
    was = {r.trial: r.values.get("top1") for r in before or ()}
    marked = knee_of(front, axes, dense)
    rows = []
    for r in front:
        timed = r.timed or latencies.get(r.trial)
        row: dict[str, Any] = {
            "trial": r.trial,
            "method": r.method,
            "recipe": str(Recipe.from_dict(r.recipe)),
            "top1": r.values["top1"],
            "top1_low": r.top1_low,
            "top1_high": r.top1_high,
            "top1_change": None if dense is None else r.values["top1"] - dense.values["top1"],
            "gmacs": r.values["gmacs"],
            "gmacs_share": None if dense is None else r.values["gmacs"] / dense.values["gmacs"],
            "params_m": r.values["params_m"],
            "peak_mb": r.values.get("peak_mb"),
            "latency_ms": r.values.get("latency_ms", timed.p50_ms if timed else None),
            "speedup": timed.speedup if timed else None,
            "speedup_low": timed.speedup_low if timed else None,
            "speedup_high": timed.speedup_high if timed else None,
            "latency_target": None if timed is None else timed.target,
            "images": r.images,
            "knee": r is marked,
            "recovered": before is not None,
            "top1_before": was.get(r.trial),
        }
        rows.append(row)
    return rows


def front_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """For a terminal; intervals are 95 %. Recovered rows say what they were before."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    recovered = any(r["recovered"] for r in rows)
    for name, justify in (
        ("trial", "right"), *([("before %", "right")] if recovered else ()),
        ("top-1 %", "right"), ("95 %", "left"), ("vs dense", "right"),
        ("GMACs", "right"), ("of dense", "right"), ("M par.", "right"), ("ms", "right"),
        ("speed-up", "left"), ("recipe", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "recipe")
    for r in rows:
        table.add_row(
            f"{r['trial']}{' *' if r['knee'] else ''}",
            *([_shown(r["top1_before"], ".2f")] if recovered else ()),
            f"{r['top1']:.2f}",
            _span(r["top1_low"], r["top1_high"], ".1f"),
            _shown(r["top1_change"], "+.2f"),
            f"{r['gmacs']:.4g}",
            _shown(r["gmacs_share"], ".0%"),
            f"{r['params_m']:.4g}",
            _shown(r["latency_ms"], ".3g"),
            _shown(r["speedup"], ".2f")
            + (" " + _span(r["speedup_low"], r["speedup_high"], ".2f") if r["speedup"] else ""),
            r["recipe"],
        )
    return table


def trial_rows(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Every trial as a plain dict: trial, state, recipe, top1, gmacs, images, reason, and more."""
    return [
        {
            "trial": r.trial,
            "state": r.state,
            "method": r.method,
            "recipe": r.recipe,
            "top1": r.values.get("top1"),
            "top5": r.values.get("top5"),
            "gmacs": r.values.get("gmacs"),
            "params_m": r.values.get("params_m"),
            "latency_ms": r.values.get("latency_ms"),
            "peak_mb": r.values.get("peak_mb"),
            "images": r.images,
            "seconds": round(r.seconds, 3),
            "reason": r.reason,
        }
        for r in results
    ]


def trial_table(results: Sequence[TrialResult], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in ("trial", "state", "top-1 %", "GMACs", "images", "s", "recipe", "reason"):
        right = name in ("trial", "top-1 %", "GMACs", "images", "s")
        table.add_column(name, justify="right" if right else "left")
    for r in results:
        table.add_row(
            str(r.trial), r.state, _shown(r.values.get("top1"), ".2f"),
            _shown(r.values.get("gmacs"), ".4g"), str(r.images or ""),
            _shown(r.seconds or None, ".1f"), str(Recipe.from_dict(r.recipe)), r.reason,
        )  # fmt: skip
    return table


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    """One object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with a header line; empty for no rows."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _span(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{low:{form}}–{high:{form}}"
