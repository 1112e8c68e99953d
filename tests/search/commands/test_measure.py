"""`vitpareto measure` and `profile`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import STUDY, Run
from vitpareto.methods.engine.bad_input import Code


def test_a_recipe_is_measured_beside_the_dense_model(
    command: Run, cache: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("structure: {method: resize, size: 48}\ntokens: {method: tome, r: 2}\n")
    measure = ("measure", "--recipe", recipe, "--images", 30, "--cache", cache)
    result = command(*measure, "--json")
    assert result.code == 0, result.err
    (measured,) = result.rows
    assert measured["images"] == 30 and measured["gmacs"] < 0.7 * measured["dense_gmacs"]
    text = command(*measure).out
    assert "resize size=48 tome r=2" in text and "speed-up" in text


def test_a_trial_of_a_study_is_measured_again(command: Run, study_store: Path, cache: Path) -> None:
    row = command("front", STUDY, "--json", "--store", study_store).rows[0]
    result = command(
        "measure", "--study", STUDY, "--trial", row["trial"], "--json", "--images", 20,
        "--cache", cache, "--store", study_store,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.rows[0]["gmacs"] == pytest.approx(row["gmacs"], rel=1e-4)


def test_a_method_without_its_weights_is_refused(command: Run, cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tokens: {method: patchmerger, prune_layers: [3], num_tokens: 20}\n")
    result = command("measure", "--recipe", recipe, "--images", 30, "--cache", cache, "--json")
    result.is_refused(Code.MISSING, method="patchmerger")
    assert result.out == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), Code.MISSING),
        (("--study", "s"), Code.MISSING),
        (("--trial", 1), Code.MISSING),
        (("--recipe", "r.yaml", "--study", "s"), Code.CONFLICT),
    ],
)
def test_one_recipe_or_trial_is_required(
    command: Run, arguments: tuple[object, ...], code: Code
) -> None:
    command("measure", *arguments).is_refused(code, options=("--recipe", "--study", "--trial"))


def test_a_profile_holds_for_its_target(command: Run, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    result = command("profile", "--batch", 2, "--points", 2, "--rounds", 1, "--out", out)
    assert result.code == 0 and result.out == f"{out}\n"
    assert "latencies of digits on device cpu, runtime eager, dtype float32, batch 2" in result.err
    search = ("search", "--store", tmp_path / "studies", "--cache", cache, "--profile", out)
    error = command(*search, "--methods", "nvit", "--prepare-epochs", 1).is_refused(Code.MISMATCH)
    assert "batch" in error.details["keys"]
    command(*search, "--methods", "topk", "--latency-batch", 2).is_refused(
        Code.CONFLICT, key="profile", accepted=["nvit"]
    )


def test_profile_refuses_bad_options(command: Run, tmp_path: Path) -> None:
    profile = ("profile", "--out", tmp_path / "p.json")
    command(*profile, "--model", "digitz").is_refused(Code.UNKNOWN_NAME, closest="digits")
    command(*profile, "--dtype", "float23").is_refused(Code.OUT_OF_RANGE, option="--dtype")
    command(*profile, "--batch", 0).is_refused(Code.OUT_OF_RANGE, option="--batch", got=0)
    command(*profile, "--points", 1).is_refused(Code.OUT_OF_RANGE, name="points", got=1)
    nowhere = tmp_path / "no" / "p.json"
    command("profile", "--out", nowhere).is_refused(Code.NOT_FOUND, path=str(nowhere.parent))
