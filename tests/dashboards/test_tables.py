"""Tables for a terminal: every figure is in its cell, and nothing is cut."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tests.command_line import Run
from tests.dashboards.front_results import LATENCIES, results, rows
from tests.dashboards.studies import write_study
from vitpareto.dashboards.bench_table import bench_table
from vitpareto.dashboards.tables import damage_table, front_table, studies_table, trial_table
from vitpareto.search.export import benchmark
from vitpareto.search.export.benchmark import ProgramTiming


def text(table: Table | None) -> str:
    assert table is not None
    out = io.StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


def cells(table: Table | None, first: str) -> list[str]:
    """The cells of the row whose first cell is `first`."""
    (line,) = (one for one in text(table).splitlines() if one.split("│")[0].strip() == first)
    return [cell.strip() for cell in line.split("│")]


def test_the_front_shows_search_held_out_and_latency() -> None:
    front = [row for row in rows() if not row.recovered]
    table = front_table(front, "the front")
    header = next(one for one in text(table).splitlines() if "GMACs" in one)
    for name in ("search %", "held-out %", "95 %, all", "ms", "speed-up", "recipe"):
        assert name in header
    (timed,) = (row for row in front if row.latency_ms is not None)
    found = cells(table, f"{timed.trial}{' *' if timed.knee else ''}")
    assert f"{timed.top1:.2f}" in found and f"{timed.certified_top1:.2f}" in found
    assert "20" in found and "2.00 1.90–2.10" in found and timed.recipe in found


def test_columns_without_values_are_left_out() -> None:
    plain = [replace(row, certified_top1=None, latency_ms=None) for row in rows()]
    shown = text(front_table(plain, "the front"))
    assert "held-out" not in shown and "speed-up" not in shown


def test_a_recovered_front_shows_the_accuracy_before() -> None:
    recovered = [replace(row, recovered=True, top1_before=50.25) for row in rows()]
    assert "before %" in text(front_table(recovered, "recovered"))
    assert "50.25" in text(front_table(recovered, "recovered"))


def test_damage_names_the_worst_class_unless_none_loses() -> None:
    (row, *_) = (row for row in rows() if row.worst_class_drop is not None and row.lost is not None)
    found = cells(damage_table([row], "damage"), str(row.trial))
    assert found[-4:] == ["cat", "-25.0", "4", "within noise"]
    beyond = replace(row, worst_class_beyond_noise=True)
    assert cells(damage_table([beyond], "damage"), str(row.trial))[-4:-1] == ["cat", "-25.0", "4"]
    unharmed = replace(row, worst_class_drop=0.0)
    assert "none" in cells(damage_table([unharmed], "damage"), str(row.trial))
    unknown = replace(row, worst_class_drop=None)
    assert "cat" not in text(damage_table([unknown], "damage"))


def test_there_is_no_damage_without_a_comparison() -> None:
    assert damage_table([replace(row, lost=None) for row in rows()], "damage") is None


def test_trials_show_the_reason_for_stopping() -> None:
    found = cells(trial_table(results(), "trials"), "3")
    assert found[1:4] == ["raced_out", "41.00", "2.9"] and found[-1] == "worse than trial 1"


def test_timings_of_a_bundle() -> None:
    timings = [ProgramTiming("onnxruntime", 64, LATENCIES[1], 1.6)]
    found = cells(bench_table(timings, "bundle"), "onnxruntime")
    assert found == ["onnxruntime", "64", "20", "40", "3200", "2.00", "1.90–2.10", "1.60", "1.25"]


def test_bench_prints_a_table_or_json(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def bench_bundle(bundle: Path, **options: object) -> list[ProgramTiming]:
        asked.update(options, bundle=bundle)
        return [ProgramTiming("onnxruntime", 64, LATENCIES[1], 1.6)]

    monkeypatch.setattr(benchmark, "bench_bundle", bench_bundle)
    run = ("bench", tmp_path, "--runtimes", "onnxruntime", "--batches", "1,64", "--rounds", 3)
    (row,) = command(*run, "--json").rows
    assert (row["runtime"], row["latency_ms"], row["macs_ratio"]) == ("onnxruntime", 20.0, 1.6)
    assert asked == {
        "bundle": tmp_path, "runtimes": ["onnxruntime"], "batches": [1, 64], "device": "cpu",
        "rounds": 3,
    }  # fmt: skip
    assert "onnxruntime" in command(*run).out


def test_studies_are_compared_by_front_and_knee(tmp_path: Path) -> None:
    empty = write_study(tmp_path, "one", 1)
    found = cells(studies_table([empty, write_study(tmp_path, "two", 40)]), "two")
    assert found[1:3] == ["digits", "digits"] and int(found[3]) > int(found[5]) > 1
    assert float(found[6]) > 0 and found[9].endswith(" G")
    alone = cells(studies_table([empty]), "one")
    assert alone[3:6] == ["1", "0", "1"] and alone[8:] == ["", "", ""]
