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

from vitpareto.methods import Recipe
from vitpareto.search.export.benchmark import Timed
from vitpareto.search.measure.latency import Latency
from vitpareto.search.stats.pareto import hypervolume
from vitpareto.search.study.certificates import flipped, order_changes
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of, reference_point
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES
from vitpareto.search.study.results import TrialResult


def front_rows(
    results: Sequence[TrialResult],
    latencies: dict[int, Latency],
    objectives: Sequence[str],
    before: Sequence[TrialResult] | None = None,
) -> list[dict[str, Any]]:
    """The front, cheapest first: one plain dict a member (percent, points, G, M, ms, MB).

    `top1` is of the search images, `certified_top1` of the held-out ones, its interval one that
    holds for all certified trials at once; None where a member is not certified. `lost` are the
    images that the dense model has right and the member wrong, `gained` the other way round, of the
    split `flips_of`. `contradicts` are the members whose order with this one held-out images turn
    round, `contradicts_beyond_noise` those of them where that is more than noise.

    before: for results that were recovered, the study's own, whose dense model they are compared
    with; `top1_before` is the same trial's top-1 among them.
    """
    axes = [OBJECTIVES[o] for o in objectives]
    front, dense = front_of(results, axes), reference_of(results if before is None else before)
    was = {r.trial: r.values.get("top1") for r in before or ()}
    marked, changes = knee_of(front, axes, dense), order_changes(front)
    rows = []
    for r in front:
        timed = r.timed or latencies.get(r.trial)
        turned = [c for c in changes if r.trial in (c.first, c.second)]
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
            **_held_out(r, dense),
            "contradicts": [c.second if c.first == r.trial else c.first for c in turned],
            "contradicts_beyond_noise": [
                c.second if c.first == r.trial else c.first for c in turned if c.beyond_noise
            ],
        }
        rows.append(row)
    return rows


def _held_out(result: TrialResult, dense: TrialResult | None) -> dict[str, Any]:
    """A member's columns of the held-out images: None where there are none."""
    own = result.certified
    worst = None if own is None else own.worst
    lost, gained, split = flipped(result, dense) or (None, None, None)
    return {
        "certified_top1": own and own.top1,
        "certified_top1_low": own and own.low,
        "certified_top1_high": own and own.high,
        "certified_change": own and own.change,
        "certified_change_low": own and own.change_low,
        "certified_change_high": own and own.change_high,
        "certified_images": own and own.images,
        "lost": lost,
        "gained": gained,
        "flips_of": split,
        "worst_class": worst and worst.name,
        "worst_class_drop": worst and worst.drop,
        "worst_class_images": worst and worst.images,
        "worst_class_beyond_noise": worst and worst.beyond_noise,
    }


def front_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """For a terminal; intervals are 95 %. Recovered rows say what they were before."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    recovered = any(r["recovered"] for r in rows)
    certified = any(r["certified_top1"] is not None for r in rows)
    timed = any(r["latency_ms"] is not None for r in rows)
    for name, justify in (
        ("trial", "right"), *([("before %", "right")] if recovered else ()),
        ("search %", "right"), ("95 %", "left"), ("vs dense", "right"),
        *([("held-out %", "right"), ("95 %, all", "left")] if certified else ()),
        ("GMACs", "right"), ("of dense", "right"), ("M par.", "right"),
        *([("ms", "right"), ("speed-up", "left")] if timed else ()), ("recipe", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "recipe")
    for r in rows:
        held_out = (
            _shown(r["certified_top1"], ".2f"),
            _span(r["certified_top1_low"], r["certified_top1_high"], ".1f"),
        )
        latency = (
            _shown(r["latency_ms"], ".3g"),
            _shown(r["speedup"], ".2f")
            + (" " + _span(r["speedup_low"], r["speedup_high"], ".2f") if r["speedup"] else ""),
        )
        table.add_row(
            f"{r['trial']}{' *' if r['knee'] else ''}",
            *([_shown(r["top1_before"], ".2f")] if recovered else ()),
            f"{r['top1']:.2f}",
            _span(r["top1_low"], r["top1_high"], ".1f"),
            _shown(r["top1_change"], "+.2f"),
            *(held_out if certified else ()),
            f"{r['gmacs']:.4g}",
            _shown(r["gmacs_share"], ".0%"),
            f"{r['params_m']:.4g}",
            *(latency if timed else ()),
            r["recipe"],
        )
    return table


def damage_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table | None:
    """For a terminal: what the front's members do to images that the dense model has right, and to
    the class that loses most. None where no member can be compared.
    """
    some = [r for r in rows if r["lost"] is not None and (r["method"] != "dense" or r["recovered"])]
    if not some:
        return None
    certified = any(r["certified_change"] is not None for r in some)
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name, justify in (
        ("trial", "right"),
        *([("vs dense", "right"), ("95 %, all", "left")] if certified else ()),
        ("right to wrong", "right"), ("wrong to right", "right"),
        *([("worst class", "left"), ("vs dense", "right"), ("images", "right"), ("", "left")]
          if certified else ()),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)
    for r in some:
        change = (
            _shown(r["certified_change"], "+.2f"),
            _span(r["certified_change_low"], r["certified_change_high"], "+.1f", " to "),
        )
        drop, worst = r["worst_class_drop"], ("", "", "", "")
        if drop is not None and drop <= 0:
            worst = ("none", "", "", "")
        elif drop is not None:
            noise = "" if r["worst_class_beyond_noise"] else "within noise"
            worst = (r["worst_class"], f"{-drop:+.1f}", str(r["worst_class_images"]), noise)
        table.add_row(
            str(r["trial"]), *(change if certified else ()), str(r["lost"]), str(r["gained"]),
            *(worst if certified else ()),
        )  # fmt: skip
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


def bench_rows(found: Sequence[Timed]) -> list[dict[str, Any]]:
    """One plain dict a runtime and batch: ms a batch, images/s, ratios over the dense model."""
    return [
        {
            "runtime": t.runtime,
            "batch": t.batch,
            "latency_ms": t.latency.p50_ms,
            "latency_p95_ms": t.latency.p95_ms,
            "dense_latency_ms": t.latency.dense_p50_ms,
            "images_per_s": 1e3 * t.batch / t.latency.p50_ms,
            "speedup": t.latency.speedup,
            "speedup_low": t.latency.speedup_low,
            "speedup_high": t.latency.speedup_high,
            "macs_ratio": t.macs_ratio,
            "speedup_over_macs_ratio": t.efficiency,
            "target": t.latency.target,
        }
        for t in found
    ]


def bench_table(found: Sequence[Timed], title: str) -> Table:
    """For a terminal; intervals are 95 %."""
    target = found[0].latency.target
    where = ", ".join(f"{k} {v}" for k, v in target.items() if k in ("device", "dtype", "threads"))
    table = Table(
        title=f"{title} beside the dense model, exported alike; {where}",
        title_justify="left", show_edge=False, pad_edge=False,
    )  # fmt: skip
    for name in ("runtime", "batch", "ms", "dense ms", "images/s", "speed-up", "95 %",
                 "MACs ratio", "speed-up / MACs ratio"):  # fmt: skip
        table.add_column(name, justify="left" if name == "runtime" else "right", no_wrap=True)
    for t in found:
        own = t.latency
        table.add_row(
            t.runtime, str(t.batch), f"{own.p50_ms:.3g}", f"{own.dense_p50_ms:.3g}",
            f"{1e3 * t.batch / own.p50_ms:.4g}", f"{own.speedup:.2f}",
            _span(own.speedup_low, own.speedup_high, ".2f"), f"{t.macs_ratio:.2f}",
            f"{t.efficiency:.2f}",
        )  # fmt: skip
    return table


def studies_table(folders: Sequence[StudyFolder]) -> Table:
    """Studies side by side: sizes, the front, its knee. Hypervolumes are of one kind only where
    model and images are the same.
    """
    table = Table(title="studies", title_justify="left", show_edge=False, pad_edge=False)
    for name, justify in (
        ("study", "left"), ("model", "left"), ("images", "left"), ("in full", "right"),
        ("early", "right"), ("front", "right"), ("hypervolume", "right"), ("dense %", "right"),
        ("knee %", "right"), ("knee's cost", "right"), ("knee", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=name != "knee")  # type: ignore[arg-type]
    for folder in folders:
        results, job = folder.measured(), folder.job()
        axes = [OBJECTIVES[o] for o in job["objectives"]]
        front, dense = front_of(results, axes), reference_of(results)
        knee, volume = knee_of(front, axes, dense), ""
        if dense is not None:
            points = [[r.values[o.name] for o in axes] for r in front]
            reference = reference_point(dense.values, axes)
            volume = f"{hypervolume(points, reference, [o.sign for o in axes]):.4g}"
        cost = next((o for o in axes if o.name not in ACCURACIES), None)
        table.add_row(
            folder.name, str(job["model"]), str(job["data"]),
            str(sum(r.state == "finished" for r in results)),
            str(sum(r.state == "raced_out" for r in results)), str(len(front)), volume,
            "" if dense is None else f"{dense.values['top1']:.2f}",
            "" if knee is None else f"{knee.values['top1']:.2f}",
            "" if knee is None or cost is None else f"{knee.values[cost.name]:.4g} {cost.unit}",
            "" if knee is None else str(Recipe.from_dict(knee.recipe)),
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


def _span(low: float | None, high: float | None, form: str, to: str = "–") -> str:
    return "" if low is None or high is None else f"{low:{form}}{to}{high:{form}}"
