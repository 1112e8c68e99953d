"""A store, a study and a bundle of version 0.1 open, continue and verify with this version."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Run

RECORDED = Path(__file__).parent / "fixtures" / "version_0_1.tar.xz"
COMMAND = Path(sys.executable).with_name("vitpareto")
#: of the recorded study
TRIALS = 14


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The recorded folder, unpacked, with the path that it had replaced by the one it has here."""
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "recorded"
    for path in (folder / "studies").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("/recorded", str(folder)), encoding="utf-8")
    database = sqlite3.connect(folder / "studies" / "mlflow.db")
    with database:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(
                f"update {table} set {column} = replace({column}, '/recorded', ?)", (str(folder),)
            )
    database.close()
    return folder


def run(folder: Path, *arguments: object) -> str:
    """The installed command in a process of its own, as in a shell; what it printed."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=800,
        check=False, env={**os.environ, "VITPARETO_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("table", ["front", "trials"])
def test_its_tables_are_the_same(command: Run, recorded: Path, table: str) -> None:
    """Every key, in order, and every value that version 0.1 printed (intervals to rounding: they
    come from another routine).
    """
    result = command(table, "before", "--store", recorded / "studies", "--json")
    assert result.code == 0, result.err
    expected = rows((recorded / f"{table}.jsonl").read_text())
    found = result.rows
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, other in zip(found, expected, strict=True):
        for key, value in other.items():
            exact = not isinstance(value, float)
            assert row[key] == (value if exact else pytest.approx(value, rel=1e-12)), key


def test_its_bundle_verifies(command: Run, recorded: Path) -> None:
    result = command("verify", recorded / "bundle")
    assert result.code == 0, result.err


@pytest.mark.slow
def test_its_study_continues(recorded: Path) -> None:
    """Nothing that was measured is measured again, and nothing prepared is prepared again."""
    results = recorded / "studies" / "before" / "trials"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    prepared = {p.name for p in (recorded / "studies" / ".prepared").iterdir()}
    assert len(before) == TRIALS and len(prepared) >= 2
    run(recorded, "search", "--name", "before", "--trials", TRIALS + 4, "--store", "studies")
    after = {path.name: path.read_bytes() for path in results.iterdir()}
    assert len(after) == TRIALS + 4
    assert {name: after[name] for name in before} == before
    assert {p.name for p in (recorded / "studies" / ".prepared").iterdir()} == prepared
    states = [r["state"] for r in rows(run(recorded, "trials", "before", "--json", "--store",
                                           "studies"))]  # fmt: skip
    assert "failed" not in states


@pytest.mark.slow
def test_its_trials_are_measured_and_exported_as_before(recorded: Path) -> None:
    front = {r["trial"]: r for r in rows((recorded / "front.jsonl").read_text())}
    (trial,) = (t for t in front if t)
    study = ("before", "--store", "studies")
    options = ("--store", "studies", "--study", "before", "--trial", trial, "--json")
    measured = json.loads(run(recorded, "measure", *options))
    assert measured["top1"] == front[trial]["top1"]
    assert measured["gmacs"] == pytest.approx(front[trial]["gmacs"], abs=1e-6)
    run(recorded, "export", *study, "--trial", trial, "--out", "again")
    run(recorded, "verify", "again")


@pytest.mark.slow
def test_its_mlflow_runs_are_kept_up_to_date(recorded: Path) -> None:
    """The database of version 0.1 takes a sync: every trial's run is found again. The study's own
    run names the model's folder, which has another path here, so it is replaced.
    """
    printed = run(recorded, "sync", "before", "--store", "studies")
    assert f"{TRIALS} unchanged" in printed, printed
