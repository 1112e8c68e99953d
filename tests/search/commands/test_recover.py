"""`vitpareto recover`: a second front, from fine-tuned trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import STUDY, TRIALS, Run
from vitpareto.methods.engine.bad_input import Code

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("capacity")]


def test_recover_adds_a_second_front(command: Run, own_store: Path, cache: Path) -> None:
    def front() -> list[dict]:
        return command("front", STUDY, "--json", "--store", own_store).rows

    first = front()
    assert not any(row["recovered"] for row in first)
    where = ("--store", own_store, "--cache", cache)
    trial = first[0]["trial"]
    result = command("recover", STUDY, "--epochs", 1, "--trial", trial, "--lr", 1e-5, *where)
    assert result.code == 0, result.err
    assert "1 trials to recover" in result.err and f"trial {trial} (" in result.err
    assert "front of s: digits" in result.out and "recovered front of s: digits" in result.out
    assert "epochs 1, soft distillation" in result.out
    both = front()
    assert both[: len(first)] == first, "the front must not change"
    (after,) = both[len(first) :]
    assert after["recovered"] and after["trial"] == trial
    assert after["top1_before"] == first[0]["top1"]
    assert "recovered front" in (own_store / STUDY / "front.svg").read_text()
    assert f"{TRIALS + 1} unchanged" in command("sync", STUDY, "--store", own_store).out
    result = command("recover", STUDY, "--epochs", 1, "--trial", trial, *where)
    assert result.code == 0 and "0 trials to recover" in result.err
    refused = command("recover", STUDY, "--epochs", 2, *where).is_refused(Code.MISMATCH)
    assert set(refused.details["differences"]) == {"epochs"}
    _measured_with_its_weights(command, own_store, cache)


def _measured_with_its_weights(command: Run, store: Path, cache: Path) -> None:
    """A recipe that names the weights of the recovered trial is measured with them alone."""
    (weights,) = (store / STUDY / "weights").iterdir()
    recipe = store / "r.yaml"
    recipe.write_text(f"weights: {weights.stem}\n")
    measure = ("measure", "--recipe", recipe, "--images", 20, "--cache", cache)
    command(*measure).is_refused(Code.MISSING, accepted=weights.stem)
    assert command(*measure, "--trained", weights).code == 0
    recipe.write_text("weights: 0123456789abcdef\n")
    command(*measure, "--trained", weights).is_refused(Code.MISMATCH, got=weights.stem)
