"""A study's folder: atomic files, one driver, one identity, one measurement per candidate."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study import trial_files
from vitpareto.search.study.folder import StudyFolder, studies_in
from vitpareto.search.study.identity import SCHEMA
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits, unpack_bits
from vitpareto.search.study.trial_files import StaleWorker

TOME = RecordedRecipe.from_json({"tokens": {"method": "tome", "r": 13}})


def result(trial: int, key: str = "", state: str = "finished", **more: Any) -> TrialResult:
    values = {"top1": 80.0, "gmacs": 2.0}
    made: dict[str, Any] = {"recipe": TOME, "values": values, "ended_ms": trial, **more}
    return TrialResult(trial, state, key=key or f"{trial:016x}", **made)  # type: ignore[arg-type]


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    folder = StudyFolder(tmp_path / "studies" / "deit-s")
    folder.create()
    return folder


# --- which study, and what it depends on


def test_identity_is_written_once(study: StudyFolder) -> None:
    assert not study.exists
    study.identity.settle(
        {"model": "digits", "seed": 0, "methods": ("tome", "topk"), "max_gmacs": None}
    )
    assert study.exists
    before = (study.folder / "study.json").read_text()
    study.identity.settle(
        {"model": "digits", "seed": 0, "methods": ["tome", "topk"], "max_gmacs": None}
    )
    assert (study.folder / "study.json").read_text() == before
    assert study.identity.read() == {
        "schema": SCHEMA, "model": "digits", "seed": 0, "methods": ["tome", "topk"],
        "max_gmacs": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        ({"model": "b", "seed": 0}, {"model": ("a", "b")}),
        ({"model": "a", "seed": 1}, {"seed": (0, 1)}),
        ({"model": "a"}, {"seed": (0, None)}),
        ({"model": "a", "seed": 0, "dtype": "float16"}, {"dtype": (None, "float16")}),
        ({"model": "b", "seed": 2}, {"model": ("a", "b"), "seed": (0, 2)}),
        ({"model": "b" * 99, "seed": 0}, {"model": ("a", "b" * 99)}),
    ],
)
def test_study_with_other_settings_is_refused(
    study: StudyFolder, settings: dict[str, Any], differences: dict[str, Any]
) -> None:
    study.identity.settle({"model": "a", "seed": 0})
    study.journal.touch()  # Optuna has a trial, so the study is not empty
    before = study.identity.path.read_bytes()
    with refused(Code.MISMATCH, study="deit-s", differences=differences) as caught:
        study.identity.settle(settings)
    assert len(str(caught.value)) < 300
    assert study.identity.path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (json.dumps({"schema": SCHEMA + 1}), Code.UNSUPPORTED),
        ("{", Code.UNREADABLE),
        ("[]", Code.UNREADABLE),
        ('{"model": "a"}', Code.UNREADABLE),
    ],
)
def test_study_of_another_program_or_version_is_refused(
    study: StudyFolder, text: str, code: Code
) -> None:
    study.identity.path.write_text(text)
    for attempt in (
        lambda: study.identity.settle({"model": "a"}),
        lambda: StudyFolder.find(study.folder.parent, "deit-s"),
    ):
        with refused(code, study="deit-s"):
            attempt()


def test_study_is_found_by_name_and_the_nearest_is_named(study: StudyFolder) -> None:
    study.identity.settle({"model": "a"})
    found = StudyFolder.find(str(study.folder.parent), "deit-s")
    assert found == study and found.name == "deit-s"
    assert pickle.loads(pickle.dumps(found)) == study
    assert studies_in(study.folder.parent) == ("deit-s",)
    with refused(Code.NOT_FOUND, study="deit_s", known=["deit-s"], closest="deit-s"):
        StudyFolder.find(study.folder.parent, "deit_s")
    with refused(Code.NOT_FOUND, study="x", known=[]):
        StudyFolder.find(study.folder.parent / "nowhere", "x")
    with refused(Code.NOT_FOUND, study="x", known=[]) as caught:
        StudyFolder.find("/nowhere", "x")
    assert "the store must be a folder that exists (got /nowhere)" in str(caught.value)


def test_job_is_read_as_written(study: StudyFolder) -> None:
    assert study.job() == JobRequest()
    job = JobRequest({"name": "deit-s", "objectives": ["top1"], "latency": "off", "fixed": {}})
    study.write_job(job)
    assert study.job() == job
    assert (study.folder / "job.yaml").read_text().startswith("name: deit-s\nobjectives:\n")


@pytest.mark.parametrize("where", ["below a file", "/proc/studies", "name too long"])
def test_store_that_cannot_be_written_is_refused(tmp_path: Path, where: str) -> None:
    """Not by permissions: they do not apply if the tests run as root."""
    (tmp_path / "file").write_text("")
    places = {
        "below a file": tmp_path / "file" / "studies" / "a",
        "/proc/studies": Path("/proc/studies/a"),
        "name too long": tmp_path / ("x" * 300),
    }
    folder = StudyFolder(places[where])
    assert not folder.exists
    with refused(Code.UNWRITABLE) as caught:
        folder.create()
    store = tmp_path if where != "/proc/studies" else Path("/proc/studies")
    assert Path(caught.value.details["path"]).is_relative_to(store)


# --- one driver

#: takes the study's lock as any driver would, without the seconds that importing torch takes
HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("refused")
print("held", flush=True)
time.sleep(60)
"""


def test_lock_admits_one_driver_and_is_freed_when_it_dies(study: StudyFolder) -> None:
    assert not study.lock.is_held
    command = [sys.executable, "-c", HOLD, str(study.folder / "lock")]
    with study.lock.hold():
        assert study.lock.is_held
        second = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert (second.returncode, second.stderr) == (1, "refused\n")
    assert not study.lock.is_held
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert study.lock.is_held
        with refused(Code.BUSY, study="deit-s"), study.lock.hold():
            pass
        assert study.lock.is_held, "a refused driver must not release the lock"
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=30)
        with study.lock.hold():
            assert study.lock.is_held
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_worker_of_an_earlier_driver_cannot_write(study: StudyFolder) -> None:
    study.trials.start_epoch("first")
    study.trials.write(result(1), "first")
    study.trials.start_epoch("second")
    with pytest.raises(StaleWorker) as caught:
        study.trials.write(result(2), "first")
    assert (caught.value.trial, caught.value.study) == (2, "deit-s")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert [r.trial for r in study.trials.all()] == [1]
    study.trials.write(result(2), "second")
    study.trials.write(result(3))
    assert [r.trial for r in study.trials.all()] == [1, 2, 3]


# --- results


def test_results_are_read_as_written(study: StudyFolder) -> None:
    correct = np.random.default_rng(0).random(203) < 0.7
    low, high = wilson_interval(int(correct.sum()), 203)
    full = TrialResult(
        12, "finished", TOME, "ab" * 8, {"top1": 81.25, "gmacs": 1 / 3},
        RecordedRecipe.from_json({"tokens": {"method": "a", "counts": [9]}}), 203,
        pack_bits(correct), low, high, 1.5, "reason",
        Provenance(versions={"torch": "2"}),
    )  # fmt: skip
    others = [result(3, state="failed", values={}, reason="ValueError: ä"), result(100_001)]
    for r in (full, *others):
        study.trials.write(r)
    assert study.trials.all() == [others[0], full, others[1]]
    back = study.trials.get(12)
    assert back == full
    assert back is not None
    assert np.array_equal(unpack_bits(back.bits, back.images), correct)
    assert study.trials.get(4) is None


def test_temporary_file_is_not_a_result(study: StudyFolder) -> None:
    study.trials.write(result(1))
    (study.folder / "trials" / ".000002.json.0123456789abcdef").write_text('{"trial": 2, "sta')
    assert [r.trial for r in study.trials.all()] == [1]


def test_by_key_returns_the_first_finished_measurement(study: StudyFolder) -> None:
    assert study.trials.by_key("k") is None
    study.trials.write(result(1, "k", "failed"))
    assert study.trials.by_key("k") is None, "a failed candidate may be measured again"
    study.trials.write(result(2, "k"))
    study.trials.write(result(3, "k", values={"top1": 1.0}))
    assert study.trials.by_key("k") == result(2, "k")
    assert [r.trial for r in study.trials.all()] == [1, 2, 3]


def test_by_key_works_where_there_are_no_hard_links(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(trial_files.os, "link", refuse)
    study.trials.write(result(2, "k"))
    assert study.trials.by_key("k") == result(2, "k")


def test_latencies_are_merged_into_what_was_measured(study: StudyFolder) -> None:
    assert study.latencies.read() == {}
    values = {"top1": 80.0, "latency_ms": 3.0, "images_per_s": 9.0}
    for r in (result(0), result(1), result(2, values=values)):
        study.trials.write(r)
    timed = Latency(
        20.0, 25.0, 40.0, 2.0, 1.9, 2.1, 30, LatencyTarget("cpu", "eager", "float32", 64)
    )
    study.latencies.write({2: timed, 1: timed})
    assert study.latencies.read() == {1: timed, 2: timed}
    zero, one, two = study.measured()
    assert zero == result(0)
    assert one.values == {"top1": 80.0, "gmacs": 2.0, "latency_ms": 20.0, "images_per_s": 3200.0}
    assert two.values == values, "a latency that the trial measured is not replaced"
    assert study.trials.all()[1] == result(1), "the result file does not change"


# --- what a result says


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({}, "dense"),
        (TOME.to_json(), "tome"),
        ({"structure": {"method": "resize", "size": 160}}, "resize"),
        ({"structure": {"method": "resize", "size": 160}, **TOME.to_json()}, "resize+tome"),
        ({"tokens": None}, "dense"),
    ],
)
def test_method_of_a_result(recipe: dict[str, Any], method: str) -> None:
    made = result(1, recipe=RecordedRecipe.from_json(recipe))
    assert made.method == method
    assert made.is_reference == (method == "dense")


def test_result_round_trips_through_json(study: StudyFolder) -> None:
    made = result(1, images=9, bits=pack_bits(np.ones(9, dtype=bool)), resolved=TOME)
    assert TrialResult.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 64, 1001])
def test_bits_round_trip(images: int) -> None:
    correct = np.random.default_rng(images).random(images) < 0.5
    text = pack_bits(correct)
    assert len(text) <= 4 * (images // 24 + 1)
    back = unpack_bits(text, images)
    assert back.dtype == bool and np.array_equal(back, correct)


@pytest.mark.parametrize("images", [0, 8, 17, 30])
def test_bits_of_another_number_of_images_are_refused(images: int) -> None:
    with refused(Code.MISMATCH, images=images, got=2):
        unpack_bits(pack_bits(np.ones(9, dtype=bool)), images)
