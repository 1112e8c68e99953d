"""`vitpareto front`, `trials`, `report`, `compare`, `show` and `ui` on a study."""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
import urllib.request
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import STUDY, TRIALS, Run
from tests.dashboards.studies import write_study
from vitpareto.dashboards import mlflow_server
from vitpareto.dashboards.commands import presenter
from vitpareto.dashboards.commands.presenter import StudyPresenter
from vitpareto.dashboards.mlflow_server import Served
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.study.front_table import study_front_rows
from vitpareto.search.study.records import RecoverySettings
from vitpareto.search.training.settings import TrainingSettings


def test_trials_lists_every_trial(command: Run, study_store: Path) -> None:
    rows = command("trials", STUDY, "--json", "--store", study_store).rows
    assert len(rows) == TRIALS and {r["state"] for r in rows} <= {"finished", "raced_out"}
    assert {"trial", "state", "recipe", "top1", "gmacs", "images", "reason"} <= set(rows[0])
    assert rows[0]["recipe"] == {} and all(0 < r["images"] <= 40 for r in rows)
    assert f"{TRIALS} trials of s" in command("trials", STUDY, "--store", study_store).out


def test_front_prints_csv_and_json_of_the_same_trials(command: Run, study_store: Path) -> None:
    front = command("front", STUDY, "--json", "--store", study_store).rows
    text = command("front", STUDY, "--csv", "--store", study_store).out
    table = list(csv.DictReader(io.StringIO(text)))
    assert [int(r["trial"]) for r in table] == [r["trial"] for r in front]
    assert [r["gmacs"] for r in front] == sorted(r["gmacs"] for r in front)
    assert [r["top1"] for r in front] == sorted(r["top1"] for r in front)
    assert sum(r["knee"] for r in front) <= 1


def test_front_draws_a_plot(command: Run, study_store: Path, tmp_path: Path) -> None:
    picture = tmp_path / "front.svg"
    result = command("front", STUDY, "--plot", picture, "--store", study_store)
    assert result.code == 0 and picture.stat().st_size > 10_000
    assert "front of s: digits on digits" in result.out


def test_front_refuses_bad_options(command: Run, study_store: Path) -> None:
    front = ("front", STUDY, "--store", study_store)
    command(*front, "--plot", "front.pdf").is_refused(
        Code.WRONG_TYPE, option="--plot", got="front.pdf"
    )
    command(*front, "--max-gmacs", 0).is_refused(Code.OUT_OF_RANGE, option="--max-gmacs", got=0.0)


def test_report_writes_a_page(command: Run, study_store: Path, cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report = ("report", STUDY, "--store", study_store, "--cache", cache, "--out")
    result = command(*report, page)
    assert result.code == 0 and f"explorer: {page}" in result.out and page.exists()
    command(*report, "page.pdf").is_refused(Code.WRONG_TYPE, option="--out", got="page.pdf")
    missing = tmp_path / "nowhere" / "page.html"
    command(*report, missing).is_refused(Code.NOT_FOUND, path=str(missing.parent))


def test_compare_requires_two_studies(command: Run, study_store: Path, tmp_path: Path) -> None:
    compare = ("compare", STUDY, STUDY, "--store", study_store, "--out", tmp_path / "c.html")
    command(*compare).is_refused(Code.OUT_OF_RANGE, name="studies", got=1)


def test_compare_writes_one_page(command: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_study(tmp_path, name, 20)
    page = tmp_path / "c.html"
    result = command("compare", "one", "two", "--store", tmp_path, "--out", page)
    assert result.code == 0 and f"explorer: {page}" in result.out and page.exists()
    assert "hypervolume" in result.out


def test_a_study_without_results(command: Run, tmp_path: Path) -> None:
    """It has an empty front, no page, and nothing to send to MLflow."""
    folder = write_study(tmp_path, "s", 1)
    (folder.folder / "trials" / "000000.json").unlink()
    result = command("front", "s", "--store", tmp_path)
    assert result.code == 0 and "study s has no finished trial yet" in result.err
    command("report", "s", "--store", tmp_path).is_refused(Code.EMPTY, study="s")
    page = StudyPresenter().page(folder)
    assert page.artifacts == {} and list(page.table) == []


def test_front_names_a_recovered_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_study(tmp_path, "s", 20)
    plain = presenter._front_title(folder, study_front_rows(folder))
    assert plain.startswith("front of s: digits on digits")
    settings = RecoverySettings(TrainingSettings(epochs=5), "images")
    monkeypatch.setattr(type(folder.recovery), "settings", lambda self: settings)
    rows = [replace(row, recovered=True) for row in study_front_rows(folder)]
    title = presenter._front_title(folder, rows)
    assert title.startswith("recovered front of s") and "epochs 5, soft distillation" in title


@pytest.mark.parametrize("name", [STUDY, None])
def test_ui_prints_the_addresses(
    command: Run, study_store: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """Without the server: that it runs until it is terminated is tested below."""
    served = Served("http://u", "http://u/#/runs/r?w", "http://u/#/view", 1)
    monkeypatch.setattr(mlflow_server, "serve", lambda *_, **__: nullcontext(served))
    monkeypatch.setattr(signal, "pause", lambda: None)
    handlers: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(number))
    result = command("ui", *([name] if name else []), "--store", study_store)
    expected = [served.url]
    if name:
        explorer = "explorer: http://u/#/runs/r/artifacts/explorer.html?w"
        expected = ["front: http://u/#/view", explorer, "study: http://u/#/runs/r?w"]
    assert result.code == 0 and result.out.splitlines() == expected
    assert handlers == [signal.SIGTERM, signal.SIGHUP]


def test_show_draws_images(command: Run, cache: Path, tmp_path: Path) -> None:
    from PIL import Image

    from vitpareto.search.data import embedded_images

    recipe, picture = tmp_path / "recipe.yaml", tmp_path / "patches.png"
    recipe.write_text("tokens: {method: rajni, gamma: 0.1, min_tokens: 8, budget: image}\n")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(files, embedded_images.draw("search")[0], strict=False):
        Image.fromarray(pixels).save(path)
    result = command(
        "show", "--recipe", recipe, "--image", *files, "--json", "--cache", cache, "--out", picture
    )
    assert result.code == 0 and f"picture: {picture}" in result.err
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
    assert [Path(row["image"]).name for row in result.rows] == ["0.png", "1.png", "2.png"]
    for row in result.rows:
        assert len(row["blocks"]) == 12 and row["pruned"]["name"] in embedded_images.CLASSES
        for block in row["blocks"]:
            assert block["patches"] == 64 - block["dropped"]
            assert set(block["figures"]) == {"rho", "eta", "keep_ratio"}


def test_show_draws_a_trial_on_the_images_of_its_study(
    command: Run, study_store: Path, cache: Path, tmp_path: Path
) -> None:
    result = command(
        "show", "--study", STUDY, "--trial", 1, "--images", 2, "--store", study_store,
        "--cache", cache, "--out", tmp_path / "patches.png",
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("digits search 0 (truth: ")


def test_show_refuses_bad_input(
    command: Run, study_store: Path, cache: Path, tmp_path: Path
) -> None:
    recipe, binary, picture = tmp_path / "r.yaml", tmp_path / "b.yaml", tmp_path / "patches.png"
    recipe.write_text("tokens: {method: rajni, gamma: 0.1, min_tokens: 8, budget: image}\n")
    binary.write_bytes(b"\x89PNG\xff")
    show = ("show", "--cache", cache, "--store", study_store, "--out", picture)
    command(*show).is_refused(Code.MISSING)
    command(*show, "--study", STUDY).is_refused(Code.MISSING)
    of_trial = (*show, "--study", STUDY, "--trial")
    command(*of_trial, 999).is_refused(Code.NOT_FOUND, study=STUDY, trial=999)
    command(*of_trial, 1, "--model", "x").is_refused(Code.CONFLICT, options=("--model",))
    missing = tmp_path / "no.yaml"
    command(*show, "--recipe", missing).is_refused(Code.NOT_FOUND, path=str(missing))
    command(*show, "--recipe", binary).is_refused(Code.UNREADABLE, path=str(binary))
    command(*show, "--recipe", recipe, "--image", recipe).is_refused(
        Code.UNREADABLE, path=str(recipe)
    )
    command(*show, "--recipe", recipe, "--model", "digit").is_refused(
        Code.UNKNOWN_NAME, closest="digits"
    )
    assert not picture.exists()
    other = tmp_path / "show.pdf"
    command("show", "--recipe", recipe, "--out", other).is_refused(
        Code.OUT_OF_RANGE, got=".pdf", accepted=(".png",)
    )


@pytest.mark.slow
def test_ui_serves_the_study_until_it_is_terminated(study_store: Path) -> None:
    command = [sys.executable, "-m", "vitpareto", "ui", STUDY, "--store", str(study_store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            pages = dict(served.stdout.readline().strip().split(": ", 1) for _ in range(3))
            assert list(pages) == ["front", "explorer", "study"]
            assert all(address.startswith("http://127.0.0.1:") for address in pages.values())
            assert "viewStateShareKey" in pages["front"] and "explorer.html" in pages["explorer"]
            page = pages["study"]
            assert "/runs/" in page
            with urllib.request.urlopen(page, timeout=30) as answer:
                assert b"<title>MLflow" in answer.read()
        finally:
            served.terminate()
            assert served.wait(240) == 143
    with pytest.raises(OSError):
        urllib.request.urlopen(page, timeout=5)
