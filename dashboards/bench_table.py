"""The timings of an exported bundle as a table and as rows. Times nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table

from vitpareto.dashboards.table_cells import Column, interval_text, new_table
from vitpareto.search.export.benchmark import ProgramTiming
from vitpareto.search.measure.latency import LatencyTarget


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One runtime at one batch size. The fields are the keys of its JSON, in this order.

    Latencies are in ms per batch: `latency_ms` and `dense_latency_ms` are medians,
    `latency_p95_ms` is the 95th percentile. `speedup` is dense latency divided by latency, with its
    95 % interval; `macs_ratio` is dense MACs divided by the bundle's. `target` is the device,
    runtime, dtype and batch that were timed.
    """

    runtime: str
    batch: int
    latency_ms: float
    latency_p95_ms: float
    dense_latency_ms: float
    images_per_s: float
    speedup: float
    speedup_low: float
    speedup_high: float
    macs_ratio: float
    speedup_over_macs_ratio: float
    target: LatencyTarget

    def to_json(self) -> dict[str, Any]:
        """The row as plain values, keys in the order of the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "target": self.target.to_json()}


def bench_rows(timings: Sequence[ProgramTiming]) -> list[BenchRow]:
    """One row per runtime and batch size, in the given order."""
    return [
        BenchRow(
            runtime=t.runtime,
            batch=t.batch,
            latency_ms=t.latency.p50_ms,
            latency_p95_ms=t.latency.p95_ms,
            dense_latency_ms=t.latency.dense_p50_ms,
            images_per_s=1e3 * t.batch / t.latency.p50_ms,
            speedup=t.latency.speedup,
            speedup_low=t.latency.speedup_low,
            speedup_high=t.latency.speedup_high,
            macs_ratio=t.macs_ratio,
            speedup_over_macs_ratio=t.efficiency,
            target=t.latency.target,
        )
        for t in timings
    ]


def bench_table(timings: Sequence[ProgramTiming], title: str) -> Table:
    """A table for a terminal; intervals are 95 %."""
    rows = bench_rows(timings)
    shown = ("device", "dtype", "threads")
    target = ", ".join(f"{k} {v}" for k, v in rows[0].target.to_json().items() if k in shown)
    table = new_table(
        f"{title} and the dense model exported in the same way; {target}",
        Column("runtime"),
        *(
            Column(name, justify="right")
            for name in (
                *("batch", "ms", "dense ms", "images/s", "speed-up", "95 %"),
                *("MACs ratio", "speed-up / MACs ratio"),
            )
        ),
    )
    for row in rows:
        table.add_row(
            row.runtime,
            str(row.batch),
            f"{row.latency_ms:.3g}",
            f"{row.dense_latency_ms:.3g}",
            f"{row.images_per_s:.4g}",
            f"{row.speedup:.2f}",
            interval_text(row.speedup_low, row.speedup_high, ".2f"),
            f"{row.macs_ratio:.2f}",
            f"{row.speedup_over_macs_ratio:.2f}",
        )
    return table
