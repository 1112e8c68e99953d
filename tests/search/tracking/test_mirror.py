"""MLflow against the study: equal, without duplicates, rebuilt from nothing, never in the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitpareto.dashboards.mlflow_server import serve
from vitpareto.search.errors import UserError
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import Front, reference_point
from vitpareto.search.study.front_table import front_rows
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking import client as mlflow_client
from vitpareto.search.tracking import mirror as tracking
from vitpareto.search.tracking import runs as mlflow_runs
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.mirror import Page, SyncReport, Tracker, sync
from vitpareto.search.tracking.runs import STUDY_ID, curve_of, experiment_of, ranks_of
from vitpareto.search.trials.searcher import Tally

AXES = objectives_named(("top1", "gmacs"))
IMAGE = {"images": 8, "bits": "/w=="}


class Study:
    """A study whose results come one at a time, and the tally a searcher would give with them."""

    def __init__(self, store: Path, name: str):
        self.folder = StudyFolder(store / name)
        self.folder.create()
        common = {"model": "digits", "objectives": ["top1", "gmacs"], "seed": 0}
        self.folder.write_job({"name": name, "data": "digits", "trials": 100, **common})
        self.folder.settle({**common, "methods": ["tome", "topk"], "min_gmacs": None})
        self.tally = Tally(wanted=100)
        self.front: Front | None = None
        self.draw = random.Random(0)

    def make(self, trial: int) -> TrialResult:
        values = {"top1": 80.0, "top5": 95.0, "gmacs": 4.0, "params_m": 1.5, "peak_mb": 9.0}
        if trial == 0:
            made = {"versions": {"torch": "2.13", "timm": "1.0"}}
            return TrialResult(
                0, "finished", {}, "k0", values, seconds=0.5, provenance=made, **IMAGE
            )
        tokens = {"method": "topk", "keep_rate": 0.5, "prune_layers": [3, 6, 9]}
        recipe: dict[str, Any] = {"tokens": tokens}
        if trial % 2:
            recipe["structure"] = {"method": "resize", "size": 32}
        if trial % 5 == 3:
            return TrialResult(trial, "failed", recipe, f"k{trial}", reason="it raised: no memory")
        gmacs = self.draw.uniform(1, 4)
        values |= {"top1": 60 + 6 * gmacs - self.draw.uniform(0, 9), "gmacs": gmacs}
        return TrialResult(trial, "finished", recipe, f"k{trial}", values, seconds=0.5, **IMAGE)

    def one(self, hook: Callable[[TrialResult | None, Tally], None] | None = None) -> float:
        """One more result, durable and then heard of; the seconds that hearing took."""
        result = self.make(self.tally.finished + self.tally.failed)
        self.folder.write(result)
        if result.state == "failed":
            self.tally.failed += 1
        else:
            self.tally.finished += 1
            if self.front is None:
                dense = {o.name: result.values[o.name] for o in AXES}
                self.front = Front(AXES, reference_point(dense, AXES))
            self.front.add(result.trial, result.values)
            self.tally.hypervolume = self.front.hypervolume()
            self.tally.front = tuple(m.trial for m in self.front.members())
        began = time.perf_counter()
        if hook is not None:
            hook(result, self.tally)
        return time.perf_counter() - began

    def page(self) -> Page:
        files = {}
        for name in ("front.png", "front.svg"):
            files[name] = self.folder.folder / name
            files[name].write_bytes(b"a picture")
        return Page(files, front_rows(self.folder.measured(), {}, ("top1", "gmacs")))


def finish(tracker: Tracker, study: Study, ended: str = "all measured") -> bool:
    page = study.page()
    return tracker.finish(page.artifacts, page.table, ended=ended)


def drained(tracker: Tracker, within: float = 60) -> None:
    """Until the thread has sent what was heard."""
    deadline = time.monotonic() + within
    while tracker._todo:
        assert time.monotonic() < deadline, f"not sent: {tracker._todo}, {tracker._down}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: they take seconds to make, so it is copied."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    open_client(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return path


@pytest.fixture
def store(tmp_path: Path, empty: Path) -> Path:
    (tmp_path / "studies").mkdir()
    shutil.copy(empty, tmp_path / "studies" / "mlflow.db")
    return tmp_path / "studies"


@pytest.fixture
def study(store: Path) -> Study:
    return Study(store, "deit-s")


@pytest.fixture
def said() -> list[str]:
    """What a user is told."""
    return []


def runs(study: Study, uri: str | None = None) -> dict[int | None, Any]:
    """The study's runs by trial, no trial twice."""
    client = open_client(tracking.tracking_uri(study.folder, uri))
    experiment = client.get_experiment_by_name(experiment_of(study.folder.name))
    found = client.search_runs([experiment.experiment_id], f"tags.`{STUDY_ID}` LIKE '%'")
    trials = [r.data.tags.get("trial") for r in found]
    assert len(trials) == len(set(trials)), f"a trial has several runs: {sorted(map(str, trials))}"
    return {None if t is None else int(t): r for t, r in zip(trials, found, strict=True)}


def check(study: Study, uri: str | None = None, ended: str = "FINISHED") -> dict[int | None, Any]:
    """Every run says what the study says, none is RUNNING."""
    there = runs(study, uri)
    results = study.folder.measured()
    ranks = ranks_of(results, ("top1", "gmacs"))
    parent = there[None]
    assert parent.info.status == ended
    assert set(there) == {None, *(r.trial for r in results)}
    for r in results:
        run = there[r.trial]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FAILED" if r.state == "failed" else "FINISHED")
        assert run.data.tags["state"] == r.state and run.data.tags["study"] == study.folder.name
        assert run.data.tags.get("reason", "") == r.reason
        assert run.data.tags["method"] == run.data.params["method"] == r.method
        expected = {**r.values, "pareto_rank": ranks[r.trial]} if r.trial in ranks else {}
        assert run.data.metrics == pytest.approx(expected)
        assert run.data.tags["pareto"] == str(ranks.get(r.trial) == 0).lower()
    return there


# --- equal


def test_runs_say_what_the_study_says(study: Study, said: list[str]) -> None:
    with Tracker(study.folder, say=said.append) as tracker:
        for _ in range(12):
            study.one(tracker.hear)
        assert finish(tracker, study), "\n".join(said)
    there = check(study)
    assert said == []
    assert there[1].data.params == {
        "method": "resize+topk", "keep_rate": "0.5", "prune_layers": "[3, 6, 9]",
        "structure.method": "resize", "structure.size": "32",
    }  # fmt: skip
    assert yaml.safe_load(there[1].data.tags["recipe"]) == study.folder.result(1).recipe
    assert there[3].data.tags["reason"] == "it raised: no memory"
    assert there[1].info.end_time - there[1].info.start_time == 500
    assert (study.folder.folder / "outbox.jsonl").read_bytes() == b""

    parent = there[None]
    assert parent.data.params["model"] == "digits"
    assert parent.data.tags["version.torch"] == "2.13"
    assert parent.data.tags["state"] == "finished"
    note = parent.data.tags["mlflow.note.content"]
    assert "vitpareto export deit-s --knee --out bundle/" in note
    assert all(f"| {t} |" in note for t in study.tally.front)
    client = open_client(tracking.tracking_uri(study.folder, None))
    names = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert names == {"job.yaml", "front.png", "front.svg", "front.json"}
    assert (study.folder.folder.parent / "mlartifacts").is_dir()
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    assert {m.step: m.value for m in history} == pytest.approx(
        {p.step: p.value for p in _curve(study)}
    )
    assert history[-1].value == pytest.approx(study.tally.hypervolume)
    table = json.loads(
        Path(client.download_artifacts(parent.info.run_id, "front.json")).read_text()
    )
    assert [row[0] for row in table["data"]] == list(study.tally.front)


def _curve(study: Study) -> list[mlflow_runs.CurvePoint]:
    results = study.folder.results()
    return curve_of(results, ("top1", "gmacs"))


def test_latencies_timed_at_the_end_arrive_with_it(study: Study) -> None:
    from vitpareto.search.measure.latency import Latency

    with Tracker(study.folder) as tracker:
        study.one(tracker.hear)
        drained(tracker)
        timed = Latency(20.0, 25.0, 40.0, 2.0, 1.9, 2.1, 30, {"device": "cpu", "batch": 64})
        study.folder.write_latencies({0: timed})
        assert finish(tracker, study)
    metrics = check(study)[0].data.metrics
    assert metrics["latency_ms"] == 20 and metrics["images_per_s"] == 3200


# --- as few calls as there are changes


class Counting:
    """A client that counts its calls, and fails where it is told to."""

    def __init__(self, client: Any):
        self.client, self.calls = client, Counter[str]()
        self.batches: Counter[str] = Counter()
        self.fault: Callable[[str, tuple[Any, ...], bool], None] = lambda *_: None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.client, name)

        def counted(*args: Any, **more: Any) -> Any:
            self.calls[name] += 1
            if name == "log_batch":
                self.batches[args[0]] += 1
            self.fault(name, args, False)
            out = call(*args, **more)
            self.fault(name, args, True)
            return out

        return counted


@pytest.fixture
def counting(study: Study, monkeypatch: pytest.MonkeyPatch) -> Counting:
    made = Counting(open_client(tracking.tracking_uri(study.folder, None)))
    monkeypatch.setattr(mlflow_client, "open_client", lambda uri: made)
    monkeypatch.setattr(tracking, "FIRST_PAUSE_S", 0.05)
    return made


def test_a_trial_is_three_calls_and_only_those_that_left_the_front_are_told_again(
    study: Study, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CURVE_EVERY_S", 1e6)
    with Tracker(study.folder) as tracker:
        study.one(tracker.hear)
        drained(tracker)
        counting.calls.clear()
        left = 0
        for _ in range(15):
            before = set(study.tally.front)
            study.one(tracker.hear)
            left += len(before - set(study.tally.front))
            drained(tracker)
        assert left >= 1, "else this test says nothing"
        assert counting.calls == {
            "create_run": 15, "set_terminated": 15, "log_batch": 15 + left
        }  # fmt: skip
        assert finish(tracker, study)
    check(study)


def test_a_second_sync_changes_nothing(study: Study, counting: Counting) -> None:
    for _ in range(8):
        study.one()
    assert sync(study.folder, page=study.page()) == SyncReport(created=9)
    check(study, ended="KILLED")
    counting.calls.clear()
    assert sync(study.folder, page=study.page()) == SyncReport(unchanged=9)
    assert set(counting.calls) <= {
        "get_experiment", "get_experiment_by_name", "search_runs", "get_metric_history",
        "list_artifacts",
    }, "nothing is written"  # fmt: skip


# --- without duplicates


def test_continuing_a_study_adds_its_new_trials_only(study: Study) -> None:
    for ended in ("6 trials measured", "12 trials measured"):
        with Tracker(study.folder) as tracker:
            for _ in range(6):
                study.one(tracker.hear)
            assert finish(tracker, study, ended)
    there = check(study)
    assert there[None].data.tags["reason"] == "12 trials measured"


@pytest.mark.parametrize("after", [False, True], ids=["lost request", "lost answer"])
@pytest.mark.parametrize("name", ["create_run", "log_batch", "set_terminated"])
def test_a_call_that_fails_is_made_again_without_a_second_run(
    study: Study, counting: Counting, said: list[str], name: str, after: bool
) -> None:
    seen: Counter[str] = Counter()

    def fault(called: str, args: tuple[Any, ...], done: bool) -> None:
        if called == name and done == after:
            seen[called] += 1
            if seen[called] % 3 == 0:
                raise ConnectionError("cut off")

    with Tracker(study.folder, say=said.append) as tracker:
        study.one(tracker.hear)
        drained(tracker)
        counting.fault = fault
        for _ in range(6):
            study.one(tracker.hear)
            drained(tracker)
        counting.fault = lambda *_: None
        assert finish(tracker, study)
    assert seen[name] >= 6
    check(study)
    assert "ConnectionError: cut off" in said[0] and "answers again" in said[1]


def test_runs_made_twice_by_a_repeated_request_are_settled(study: Study) -> None:
    study.one()
    sync(study.folder)
    run = runs(study)[0]
    client = open_client(tracking.tracking_uri(study.folder, None))
    client.create_run(run.info.experiment_id, tags=run.data.tags)
    report = sync(study.folder)
    assert (report.removed, report.unchanged) == (1, 2)
    check(study, ended="KILLED")


def test_a_run_that_mlflow_refuses_holds_nothing_up(
    study: Study, counting: Counting, said: list[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    refused: list[str] = []

    def fault(called: str, args: tuple[Any, ...], done: bool) -> None:
        if called == "create_run":
            return
        if called == "log_batch" and any(p.value == "32" for p in args[2]) or args[0] in refused:
            if args[0] not in refused:
                refused.append(args[0])
            if called == "log_batch":
                raise MlflowException("a bad value", error_code=INVALID_PARAMETER_VALUE)

    counting.fault = fault
    with Tracker(study.folder, say=said.append) as tracker:
        for _ in range(3):
            study.one(tracker.hear)
        assert finish(tracker, study)
    there = runs(study)
    assert [there[t].info.status for t in (None, 0, 1, 2)] == [
        "FINISHED", "FINISHED", "FAILED", "FINISHED"
    ]  # fmt: skip
    assert len(said) == 1 and "refused 1 runs; trial 1: " in said[0] and "a bad value" in said[0]


# --- from nothing


def test_sync_rebuilds_what_was_deleted(study: Study, empty: Path) -> None:
    with Tracker(study.folder) as tracker:
        for _ in range(6):
            study.one(tracker.hear)
        assert finish(tracker, study)
    client = open_client(tracking.tracking_uri(study.folder, None))
    client.delete_run(runs(study)[4].info.run_id)
    client.delete_run(runs(study)[None].info.run_id)
    report = sync(study.folder, page=study.page())
    assert (report.created, report.updated) == (2, 5), "and the others have a new parent"
    check(study)
    client.delete_experiment(runs(study)[0].info.experiment_id)
    sync(study.folder, page=study.page())
    check(study)

    # another database, as if this one were lost: the engine of a lost one stays open in-process
    other = empty.with_name("other.db")
    shutil.copy(empty, other)
    report = sync(study.folder, f"sqlite:///{other}", study.page())
    assert report == SyncReport(created=7)
    there = check(study, f"sqlite:///{other}")
    assert there[None].data.tags["reason"] == "all measured"
    report = sync(study.folder, f"sqlite:///{other}", study.page())
    assert report == SyncReport(unchanged=7)


def test_sync_removes_what_the_study_has_not(study: Study) -> None:
    for _ in range(3):
        study.one()
    sync(study.folder)
    (study.folder.folder / "trials" / "000002.json").unlink()
    assert sync(study.folder).removed == 1
    check(study, ended="KILLED")


# --- never left running


def test_a_search_that_is_broken_off_leaves_no_run_running(study: Study) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker(study.folder) as tracker:
        study.one(tracker.hear)
        drained(tracker)
        assert runs(study)[None].info.status == "RUNNING"
        raise KeyboardInterrupt
    check(study, ended="KILLED")


def test_what_a_killed_driver_left_running_is_closed(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LOCK_WAIT_S", 0.2)
    study.one()
    study.one()
    sync(study.folder)
    client = open_client(tracking.tracking_uri(study.folder, None))
    for trial in (None, 1):
        client.update_run(runs(study)[trial].info.run_id, status="RUNNING")
    assert sync(study.folder).closed == 2
    check(study, ended="KILLED")
    client.update_run(runs(study)[1].info.run_id, status="RUNNING")
    with Tracker(study.folder) as tracker:
        study.one(tracker.hear)
        drained(tracker)
        there = runs(study)
        assert there[None].info.status == "RUNNING" and there[1].info.status == "FINISHED"
        with pytest.raises(UserError, match="being sent to MLflow by its search"):
            sync(study.folder)
        assert finish(tracker, study)
    check(study)


def test_a_search_that_nobody_tracks_is_not_left_running(study: Study) -> None:
    study.one()
    with study.folder.locked():
        sync(study.folder)
    study.one()
    assert runs(study)[None].info.status == "KILLED"
    with Tracker(study.folder) as tracker:
        tracker.hear(None, study.tally)
        assert finish(tracker, study, "2 trials measured")
    assert check(study)[None].data.tags["reason"] == "2 trials measured"
    study.one()  # continued without a tracker: that reason is not true any more
    study.folder.write_job({"trials": 3})
    sync(study.folder)
    assert check(study)[None].data.tags["reason"] == "3 trials measured"


def test_a_copied_store_writes_into_its_own_place(study: Study, tmp_path: Path) -> None:
    study.one()
    sync(study.folder, page=study.page())
    store = study.folder.folder.parent
    copy = shutil.copytree(store, tmp_path / "copy")
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    moved = StudyFolder(copy / study.folder.name)
    (copy / study.folder.name / "front.svg").write_bytes(b"another picture")
    page = Page({"front.svg": moved.folder / "front.svg"}, study.page().table)
    assert sync(moved, page=page).created == 2
    assert sync(moved, page=page) == SyncReport(unchanged=2)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert any(p.read_bytes() == b"another picture" for p in copy.rglob("artifacts/front.svg"))


def test_the_curve_does_not_hang_on_the_files_times(study: Study) -> None:
    for _ in range(6):
        study.one()
    before = _curve(study)
    for i, path in enumerate(sorted((study.folder.folder / "trials").glob("*.json"))):
        os.utime(path, (9 - i, 9 - i))
    assert _curve(study) == before


# --- the store's database


@pytest.mark.parametrize("name", ["a b", "a#b", "ü", "a'b;c"])
def test_a_store_may_have_an_odd_name(tmp_path: Path, empty: Path, name: str) -> None:
    store = tmp_path / name
    store.mkdir()
    shutil.copy(empty, store / "mlflow.db")
    study = Study(store, "s")
    study.one()
    assert sync(study.folder).created == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    check(study, ended="KILLED")


@pytest.mark.parametrize("name", ["a%20b", "what?"])
def test_a_store_that_mlflow_would_misread_is_refused(tmp_path: Path, name: str) -> None:
    study = Study(tmp_path / name, "s")
    for start in (Tracker, sync):
        with pytest.raises(UserError, match="name another --store"):
            start(study.folder)


def test_a_database_is_built_by_one_process_and_put_in_place_whole(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.left").write_bytes(b"by one that was killed")
    program = (
        "import pathlib, sys, warnings; warnings.simplefilter('ignore');"
        "from vitpareto.search.tracking.client import *;"
        "store = pathlib.Path(sys.argv[1]); ensure_database(store);"
        "print(len(open_client(store_uri(store)).search_experiments()))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "1\n"), err
    assert not list(tmp_path.glob(".mlflow.db*"))


# --- servers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_killed_in_the_middle_gets_the_rest_when_it_is_back(
    study: Study, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LAST_PAUSE_S", 1.0)
    store, port = study.folder.folder.parent, free_port()
    uri = f"http://127.0.0.1:{port}"
    with Tracker(study.folder, uri, say=said.append) as tracker:
        with serve(store, port=port):
            for _ in range(4):
                study.one(tracker.hear)
            drained(tracker)
        slowest = max(study.one(tracker.hear) for _ in range(4))
        assert slowest < 0.5
        time.sleep(0.5)
        owed = (study.folder.folder / "outbox.jsonl").read_text().splitlines()
        assert [json.loads(line)["trial"] for line in owed] == [4, 5, 6, 7]
        with serve(store, port=port):
            drained(tracker)
            study.one(tracker.hear)
            assert finish(tracker, study)
            check(study, uri)
            assert sync(study.folder, uri, study.page()) == SyncReport(unchanged=10)
    assert len(said) == 2 and "the search goes on" in said[0] and "answers again" in said[1]


def test_a_server_that_is_away_costs_two_lines_and_sync_restores(
    study: Study, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://someone:secret@127.0.0.1:{free_port()}"
    with Tracker(study.folder, uri, say=said.append) as tracker:
        for _ in range(3):
            study.one(tracker.hear)
        began = time.monotonic()
        assert not finish(tracker, study)
        assert time.monotonic() - began < 30
    assert len(said) == 2 and "cannot be used now" in said[0] and "vitpareto sync" in said[1]
    assert "secret" not in " ".join(said)
    assert (study.folder.folder / "outbox.jsonl").stat().st_size > 0
    with pytest.raises(UserError, match=r"MLflow at http://127.0.0.1:\d+ failed"):
        sync(study.folder, uri)
    report = sync(study.folder, page=study.page())
    assert report.created == 4
    check(study)
    owed = (study.folder.folder / "outbox.jsonl").read_text()
    assert len(owed.splitlines()) == 4 and "secret" not in owed, "the other server has nothing yet"


def test_a_server_that_answers_slowly_is_not_waited_for_for_long(
    study: Study, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_S", 3.0)
    monkeypatch.setattr(tracking, "TELL_AFTER_S", 0.5)
    put = mlflow_runs.Mirror.put
    monkeypatch.setattr(
        mlflow_runs.Mirror, "put", lambda self, spec: (time.sleep(1), put(self, spec))[1]
    )
    tracker = Tracker(study.folder, say=said.append)
    for _ in range(12):
        study.one(tracker.hear)
    began = time.monotonic()
    assert not finish(tracker, study)
    assert time.monotonic() - began < 6
    assert len(said) == 2 and "sending the rest" in said[0] and "vitpareto sync" in said[1]
    monkeypatch.undo()
    sync(study.folder, page=study.page())
    check(study)


def test_a_database_that_cannot_be_opened_is_said_at_once(study: Study, said: list[str]) -> None:
    uri = f"sqlite:///{study.folder.folder}/no/such/folder/x.db"
    with Tracker(study.folder, uri, say=said.append) as tracker:
        study.one(tracker.hear)
        began = time.monotonic()
        assert not finish(tracker, study)
    with pytest.raises(UserError, match=r"x\.db: unable to open database file"):
        sync(study.folder, uri)
    assert time.monotonic() - began < 10
    assert len(said) == 2


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_never_answers_costs_the_search_nothing(
    study: Study, silent: str, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = Tracker(study.folder, silent, say=said.append)
    took = sorted(study.one(tracker.hear) for _ in range(60))
    # a median of tens of microseconds; a thousandth of the time limit is a generous bound
    assert took[30] < 0.002 and took[-1] < 1.0
    began = time.monotonic()
    assert not finish(tracker, study)
    assert time.monotonic() - began < 25
    assert sync(study.folder, page=study.page()).created == 61


def test_an_address_that_makes_no_sense_is_said_once(study: Study, said: list[str]) -> None:
    with Tracker(study.folder, "gopher://x", say=said.append) as tracker:
        study.one(tracker.hear)
        assert not finish(tracker, study)
    assert len(said) == 2 and "gopher" in said[0]


# --- what is said


def test_a_long_note_is_cut_at_a_line() -> None:
    note = "\n".join(f"| {i} | line |" for i in range(2000))
    cut = mlflow_runs.note_that_fits(note)
    assert len(cut) <= mlflow_runs.LONGEST_TAG and "cut here" in cut
    assert cut.splitlines()[-3] in note.splitlines()
    assert mlflow_runs.note_that_fits("short") == "short"


def test_ranks_are_zero_for_the_front_alone() -> None:
    def at(trial: int, top1: float, gmacs: float, state: str = "finished") -> TrialResult:
        values = {"top1": top1, "gmacs": gmacs}
        return TrialResult(trial, state, {}, str(trial), values)  # type: ignore[arg-type]

    results = [at(0, 80, 4), at(1, 80, 4), at(2, 70, 4), at(3, 60, 1), at(4, 99, 1, "raced_out")]
    assert ranks_of(results, ("top1", "gmacs")) == {0: 0, 1: 1, 2: 1, 3: 0}
    assert ranks_of([], ("top1", "gmacs")) == {}
