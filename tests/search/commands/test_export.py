"""`vitpareto sync`, `export` and `verify` on a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import STUDY, TRIALS, Run
from vitpareto.methods.engine.bad_input import Code


def test_sync_after_a_search_changes_nothing(command: Run, study_store: Path) -> None:
    result = command("sync", STUDY, "--store", study_store)
    assert result.out == (
        f"0 runs created, 0 updated, 0 closed, 0 removed, {TRIALS + 1} unchanged\n"
    )


@pytest.mark.slow
def test_a_trial_is_exported_and_verified(command: Run, study_store: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    front = command("front", STUDY, "--json", "--store", study_store).rows
    best = max(front, key=lambda row: row["certified_top1_low"])
    reached = best["certified_top1_low"]
    export = ("export", STUDY, "--store", study_store, "--out", bundle)
    result = command(*export, "--min-top1", reached)
    assert result.code == 0 and result.out == f"{bundle}\n"
    assert f"trial {best['trial']} " in result.err
    result = command("verify", bundle)
    assert result.code == 0 and "verified: 20 images" in result.out

    command(*export, "--min-top1", 1).is_refused(Code.EXISTS, path=str(bundle))
    labels = json.loads((bundle / "labels.json").read_text())
    (bundle / "labels.json").write_text(json.dumps(labels[::-1]))
    error = command("verify", bundle).is_refused(Code.MISMATCH)
    assert set(error.details["expected"]) == {"labels.json"}


def test_a_budget_below_every_trial_is_refused(
    command: Run, study_store: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    export = ("export", STUDY, "--store", study_store, "--out", bundle)
    command(*export, "--max-gmacs", 1e-6).is_refused(Code.EMPTY, budget={"gmacs": 1e-6})
    assert not bundle.exists()


def test_export_refuses_options_that_do_not_fit(
    command: Run, study_store: Path, tmp_path: Path
) -> None:
    export = ("export", STUDY, "--store", study_store, "--out", tmp_path / "b", "--trial", 0)
    command(*export, "--alias", "knee").is_refused(Code.MISSING, option="--register")
    command(*export, "--recovered").is_refused(Code.EMPTY, study=STUDY, name="recovered")
    command(*export, "--static-batch", 0).is_refused(
        Code.OUT_OF_RANGE, option="--static-batch", got=0
    )
