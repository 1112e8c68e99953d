"""CSV, JSON and MLflow tables stay byte-identical to version 0.1.0: scripts depend on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from tests.dashboards.front_results import LATENCIES, results, rows
from vitpareto.dashboards.bench_table import bench_rows
from vitpareto.dashboards.csv_json import csv_text, json_lines
from vitpareto.search.export.benchmark import ProgramTiming
from vitpareto.search.study.trial_table import trial_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "rows"


def golden(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


def test_csv_of_the_front_is_unchanged() -> None:
    assert csv_text(rows()) == golden("front.csv")


def test_json_of_the_front_is_unchanged() -> None:
    assert json_lines(rows()) == golden("front.jsonl")


def test_mlflow_table_of_the_front_is_unchanged() -> None:
    frame = pd.DataFrame([row.to_json() for row in rows()], dtype=object)
    text = frame.to_json(orient="split", index=False, date_format="iso")
    assert text == golden("front_mlflow.json")


def test_json_of_trials_is_unchanged() -> None:
    # certificates are no part of a trial's row
    plain = [replace(r, certified=None) for r in results()]
    assert json_lines(trial_rows(plain)) == golden("trials.jsonl")


def test_json_of_a_benchmark_is_unchanged() -> None:
    timings = [ProgramTiming("onnxruntime", 64, LATENCIES[1], 1.6)]
    assert json_lines(bench_rows(timings)) == golden("bench.jsonl")


def test_csv_of_no_rows_is_empty() -> None:
    assert csv_text([]) == ""
