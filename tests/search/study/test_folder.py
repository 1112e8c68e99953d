"""A study's folder: whole or untouched, one driver, no mixing, nothing measured twice."""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitpareto.search.errors import UserError
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study import folder as store
from vitpareto.search.study.folder import SCHEMA, StaleWorker, StudyFolder, studies_in
from vitpareto.search.study.results import TrialResult, pack_bits, unpack_bits

TOME = {"tokens": {"method": "tome", "r": 13}}


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


def test_a_study_settles_once_and_is_then_the_same(study: StudyFolder) -> None:
    assert not study.exists
    study.settle({"model": "digits", "seed": 0, "methods": ("tome", "topk"), "max_gmacs": None})
    assert study.exists
    before = (study.folder / "study.json").read_text()
    study.settle({"model": "digits", "seed": 0, "methods": ["tome", "topk"], "max_gmacs": None})
    assert (study.folder / "study.json").read_text() == before
    assert study.identity() == {
        "schema": SCHEMA, "model": "digits", "seed": 0, "methods": ["tome", "topk"],
        "max_gmacs": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("now", "said", "unsaid"),
    [
        ({"model": "b", "seed": 0}, 'model was "a", now "b"', "seed"),
        ({"model": "a", "seed": 1}, "seed was 0, now 1", "model was"),
        ({"model": "a"}, "seed was 0, now null", "model was"),
        ({"model": "a", "seed": 0, "dtype": "float16"}, 'dtype was null, now "float16"', "seed"),
        ({"model": "b", "seed": 2}, 'model was "a", now "b"; seed was 0, now 2', "schema"),
        ({"model": "b" * 99, "seed": 0}, "bbb...", "b" * 60),
    ],
)
def test_numbers_are_not_mixed(
    study: StudyFolder, now: dict[str, Any], said: str, unsaid: str
) -> None:
    study.settle({"model": "a", "seed": 0})
    study.journal.touch()  # Optuna was asked: there is something to mix with
    before = (study.folder / "study.json").read_bytes()
    with pytest.raises(UserError) as caught:
        study.settle(now)
    assert said in str(caught.value) and unsaid not in str(caught.value)
    assert "deit-s" in str(caught.value) and "--name" in str(caught.value)
    assert (study.folder / "study.json").read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"schema": SCHEMA + 1}), f"has schema {SCHEMA + 1}, this version reads up to"),
        ("{", "study.json cannot be read"),
        ("[]", "names no schema"),
        ('{"model": "a"}', "names no schema"),
    ],
)
def test_a_study_of_another_version_is_refused_to_readers_too(
    study: StudyFolder, text: str, said: str
) -> None:
    (study.folder / "study.json").write_text(text)
    for attempt in (
        lambda: study.settle({"model": "a"}),
        lambda: StudyFolder.find(study.folder.parent, "deit-s"),
    ):
        with pytest.raises(UserError, match=said):
            attempt()


def test_a_study_is_found_by_name_or_the_nearest_is_told(study: StudyFolder) -> None:
    study.settle({"model": "a"})
    found = StudyFolder.find(str(study.folder.parent), "deit-s")
    assert found == study and found.name == "deit-s"
    assert pickle.loads(pickle.dumps(found)) == study
    assert studies_in(study.folder.parent) == ("deit-s",)
    with pytest.raises(UserError, match="no study 'deit_s' in .*: did you mean 'deit-s'"):
        StudyFolder.find(study.folder.parent, "deit_s")
    with pytest.raises(UserError, match="no study 'x' in .*; known: none"):
        StudyFolder.find(study.folder.parent / "nowhere", "x")


def test_a_job_comes_back(study: StudyFolder) -> None:
    assert study.job() == {}
    study.write_job({"name": "deit-s", "objectives": ["top1"], "latency": "off", "fixed": {}})
    assert study.job() == {
        "name": "deit-s", "objectives": ["top1"], "latency": "off", "fixed": {},
    }  # fmt: skip


@pytest.mark.parametrize("where", ["below a file", "/proc/studies", "name too long"])
def test_a_store_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path, where: str) -> None:
    """Not by permissions: the tests may run as root, for whom they are none."""
    (tmp_path / "file").write_text("")
    places = {
        "below a file": tmp_path / "file" / "studies" / "a",
        "/proc/studies": Path("/proc/studies/a"),
        "name too long": tmp_path / ("x" * 300),
    }
    folder = StudyFolder(places[where])
    assert not folder.exists
    with pytest.raises(UserError, match="the store cannot be written: .*: ") as caught:
        folder.create()
    assert str(tmp_path if where != "/proc/studies" else "/proc/studies") in str(caught.value)


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


def test_one_driver_at_a_time_and_the_lock_dies_with_it(study: StudyFolder) -> None:
    assert not study.running
    command = [sys.executable, "-c", HOLD, str(study.folder / "lock")]
    with study.locked():
        assert study.running
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (second.returncode, second.stderr) == (1, "refused\n")
    assert not study.running
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert study.running
        with pytest.raises(UserError, match="deit-s is being searched by another process"):
            study.locked().__enter__()
        assert study.running, "a refused driver must not take the lock away"
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=30)
        with study.locked():
            assert study.running
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_late_worker_of_an_earlier_driver_cannot_write(study: StudyFolder) -> None:
    study.start_epoch("first")
    study.write(result(1), "first")
    study.start_epoch("second")
    with pytest.raises(StaleWorker, match="trial 2 belongs to an earlier run of deit-s"):
        study.write(result(2), "first")
    assert [r.trial for r in study.results()] == [1]
    study.write(result(2), "second")
    study.write(result(3))  # the driver itself
    assert [r.trial for r in study.results()] == [1, 2, 3]


# --- results


def test_results_come_back_as_they_were(study: StudyFolder) -> None:
    correct = np.random.default_rng(0).random(203) < 0.7
    low, high = wilson_interval(int(correct.sum()), 203)
    full = TrialResult(
        12, "finished", TOME, "ab" * 8, {"top1": 81.25, "gmacs": 1 / 3},
        {"tokens": {"counts": [9]}}, 203, pack_bits(correct), low, high, 1.5, "said",
        {"versions": {"torch": "2"}},
    )  # fmt: skip
    others = [result(3, state="failed", values={}, reason="ValueError: ä"), result(100_001)]
    for r in (full, *others):
        study.write(r)
    assert study.results() == [others[0], full, others[1]]
    back = study.result(12)
    assert back == full
    assert back is not None
    assert np.array_equal(unpack_bits(back.bits, back.images), correct)
    assert study.result(4) is None


def test_a_half_written_file_is_no_result(study: StudyFolder) -> None:
    study.write(result(1))
    (study.folder / "trials" / ".000002.json.0123456789abcdef").write_text('{"trial": 2, "sta')
    assert [r.trial for r in study.results()] == [1]


def test_a_candidate_is_known_by_its_first_finished_measurement(study: StudyFolder) -> None:
    assert study.known("k") is None
    study.write(result(1, "k", "failed"))
    assert study.known("k") is None, "what failed may be tried again"
    study.write(result(2, "k"))
    study.write(result(3, "k", values={"top1": 1.0}))
    assert study.known("k") == result(2, "k")
    assert [r.trial for r in study.results()] == [1, 2, 3]


def test_by_key_works_where_there_are_no_hard_links(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(store.os, "link", refuse)
    study.write(result(2, "k"))
    assert study.known("k") == result(2, "k")


def test_latencies_are_merged_into_what_was_measured(study: StudyFolder) -> None:
    assert study.latencies() == {}
    own = {"top1": 80.0, "latency_ms": 3.0, "images_per_s": 9.0}
    for r in (result(0), result(1), result(2, values=own)):
        study.write(r)
    timed = Latency(
        20.0, 25.0, 40.0, 2.0, 1.9, 2.1, 30, LatencyTarget("cpu", "eager", "float32", 64)
    )
    study.write_latencies({2: timed, 1: timed})
    assert study.latencies() == {1: timed, 2: timed}
    zero, one, two = study.measured()
    assert zero == result(0)
    assert one.values == {"top1": 80.0, "gmacs": 2.0, "latency_ms": 20.0, "images_per_s": 3200.0}
    assert two.values == own, "what the trial itself measured stays"
    assert study.results()[1] == result(1), "and the result file is left as it is"


# --- what a result says


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({}, "dense"),
        (TOME, "tome"),
        ({"structure": {"method": "resize", "size": 160}}, "resize"),
        ({"structure": {"method": "resize", "size": 160}, **TOME}, "resize+tome"),
        ({"tokens": None}, "dense"),
    ],
)
def test_a_result_names_its_method(recipe: dict[str, Any], method: str) -> None:
    made = result(1, recipe=recipe)
    assert made.method == method
    assert made.is_reference == (method == "dense")


def test_a_result_is_json(study: StudyFolder) -> None:
    made = result(1, images=9, bits=pack_bits(np.ones(9, dtype=bool)), resolved=TOME)
    assert TrialResult(**json.loads(json.dumps(dataclasses.asdict(made)))) == made


@pytest.mark.parametrize("images", [0, 1, 7, 8, 9, 64, 1001])
def test_bits_come_back(images: int) -> None:
    correct = np.random.default_rng(images).random(images) < 0.5
    text = pack_bits(correct)
    assert len(text) <= 4 * (images // 24 + 1)
    back = unpack_bits(text, images)
    assert back.dtype == bool and np.array_equal(back, correct)


@pytest.mark.parametrize("images", [0, 8, 17, 30])
def test_bits_of_another_number_of_images_are_refused(images: int) -> None:
    with pytest.raises(ValueError, match=f"2 bytes do not hold the correctness of {images} images"):
        unpack_bits(pack_bits(np.ones(9, dtype=bool)), images)
