"""`vitpareto table` and `reproduce`."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from tests.command_line import Run
from vitpareto.methods.engine.bad_input import Code


def test_table_times_methods_side_by_side(command: Run) -> None:
    result = command(
        "table", "--methods", "topk,ats", "--rates", "0.5", "--batch", 2, "--rounds", 2
    )
    assert result.code == 0, result.err
    assert "digits, random weights" in result.out and "batch 2" in result.out
    assert "topk keep_rate=0.5 prune_layers=[3,6,9]" in result.out
    assert "images decide" in result.out


def test_table_prints_records_with_published_figures(command: Run) -> None:
    dense, tram = command(
        "table", "--models", "vit_small_patch16_224", "--methods", "tram", "--rates", "0.75",
        "--rounds", 0, "--json",
    ).rows  # fmt: skip
    assert dense["gmacs"] == pytest.approx(4.608, abs=1e-3) and dense["images_per_s"] is None
    assert tram["published"] == "2.9964 thop (ours 2.99682)"
    text = command("table", "--methods", "topk", "--rounds", 0, "--csv").out
    assert [r["rate"] for r in csv.DictReader(io.StringIO(text))] == ["", "0.75", "0.5"]


def test_table_refuses_bad_options(command: Run) -> None:
    command("table", "--rates", "half").is_refused(Code.WRONG_TYPE, option="--rates", got="half")
    table = ("table", "--rounds", 0)
    command(*table, "--rates", "0.5,2").is_refused(Code.OUT_OF_RANGE, name="rate", got=2)
    command(*table, "--models", "digit").is_refused(Code.UNKNOWN_NAME, closest="digits")
    command(*table, "--methods", "tomee").is_refused(Code.UNKNOWN_NAME, closest="tome")
    command(*table, "--batch", "0").is_refused(Code.OUT_OF_RANGE, option="--batch", got=0)


def test_reproduce_without_data_compares_costs(command: Run) -> None:
    result = command("reproduce", "--models", "vit_small_patch16_224")
    assert result.code == 0, result.err
    assert "2.9968" in result.out and "not run: no data" in result.out and "--data" in result.err
    rows = command("reproduce", "--json").rows
    assert len(rows) == 38 and not any(r["our_top1"] for r in rows)
    assert all(r["top1_why"].startswith("not run: ") for r in rows)


def test_reproduce_measures_accuracy(
    command: Run, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    from vitpareto.search.compare import published
    from vitpareto.search.compare.published import PublishedRow

    setting = {"keep_rate": 0.25, "prune_layers": [3, 6, 9]}
    claim = PublishedRow(
        "topk", "digits", setting, "here", False, "own", top1=80.0, timm_tag="digits"
    )
    monkeypatch.setattr(published, "rows", lambda: (claim,))
    result = command("reproduce", "--data", "digits", "--cache", cache, "--csv")
    (row,) = csv.DictReader(io.StringIO(result.out))
    assert row["images"] == "1000" and 50 < float(row["our_top1"]) < float(row["our_dense_top1"])
    assert f"digits {claim.label}: {float(row['our_top1']):.3f} %" in result.err
    where = ("--data", "digits", "--cache", cache, "--weights-dir", tmp_path)
    (record,) = command("reproduce", *where, "--json").rows
    assert record["our_top1"] is None
    assert record["top1_why"].startswith("not run: digits.safetensors")


def test_reproduce_refuses_bad_options(command: Run) -> None:
    command("reproduce", "--data", "/nowhere/val").is_refused(Code.NOT_FOUND, path="/nowhere/val")
    model, near = "vit_small_patch16_225", "vit_small_patch16_224"
    command("reproduce", "--models", model).is_refused(Code.UNKNOWN_NAME, name=model, closest=near)
