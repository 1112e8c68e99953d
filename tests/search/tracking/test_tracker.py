"""A search with a tracker: runs equal the study, without duplicates, and none stays RUNNING."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.refusals import refused
from tests.search.tracking.conftest import CountingClient, Notices
from tests.search.tracking.studies import OBJECTIVES, GrowingStudy, finish, wait_until_sent
from vitpareto.search.errors import Code, UserError
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.tracking import live_updates, sync
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.notices import Event
from vitpareto.search.tracking.outbox import outbox_path
from vitpareto.search.tracking.run_contents import hypervolume_curve
from vitpareto.search.tracking.server_address import tracking_uri
from vitpareto.search.tracking.tracker import Tracker


def test_runs_of_trials_equal_the_study(study: GrowingStudy, notices: Notices) -> None:
    with Tracker(study.folder, notify=notices.add) as tracker:
        for _ in range(12):
            study.add_result(tracker.on_result)
        assert finish(tracker, study), notices
    runs = study.check_runs()
    assert notices == []
    assert runs[1].data.params == {
        "method": "resize+topk", "keep_rate": "0.5", "prune_layers": "[3, 6, 9]",
        "structure.method": "resize", "structure.size": "32",
    }  # fmt: skip
    result = study.folder.trials.get(1)
    assert result is not None
    assert yaml.safe_load(runs[1].data.tags["recipe"]) == result.recipe.to_json()
    assert runs[3].data.tags["reason"] == "it raised: no memory"
    assert runs[1].info.end_time - runs[1].info.start_time == 500
    assert outbox_path(study.folder).read_bytes() == b""


def test_run_of_the_study_has_note_artifacts_and_curve(study: GrowingStudy) -> None:
    with Tracker(study.folder) as tracker:
        for _ in range(12):
            study.add_result(tracker.on_result)
        assert finish(tracker, study)
    parent = study.runs()[None]
    assert parent.data.params["model"] == "digits"
    assert parent.data.tags["version.torch"] == "2.13"
    assert parent.data.tags["state"] == "finished"
    note = parent.data.tags["mlflow.note.content"]
    assert "vitpareto export deit-s --knee --out bundle/" in note
    assert all(f"| {t} |" in note for t in study.progress.front)
    client = open_client(tracking_uri(study.folder, None))
    names = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert names == {"job.yaml", "front.png", "front.svg", "front.json"}
    assert (study.folder.folder.parent / "mlartifacts").is_dir()
    history = client.get_metric_history(parent.info.run_id, "hypervolume")
    curve = hypervolume_curve(study.folder.trials.all(), OBJECTIVES)
    assert {m.step: m.value for m in history} == pytest.approx(
        {p.step: p.hypervolume for p in curve}
    )
    assert curve[-1].hypervolume == pytest.approx(study.progress.hypervolume)
    downloaded = client.download_artifacts(parent.info.run_id, "front.json")
    table = json.loads(Path(downloaded).read_text())
    assert [row[0] for row in table["data"]] == list(study.progress.front)


def test_latencies_measured_at_the_end_are_sent(study: GrowingStudy) -> None:
    with Tracker(study.folder) as tracker:
        study.add_result(tracker.on_result)
        wait_until_sent(tracker)
        target = LatencyTarget("cpu", "eager", "float32", 64)
        timed = Latency(20.0, 25.0, 40.0, 2.0, 1.9, 2.1, 30, target)
        study.folder.latencies.write({0: timed})
        assert finish(tracker, study)
    metrics = study.check_runs()[0].data.metrics
    assert metrics["latency_ms"] == 20 and metrics["images_per_s"] == 3200


# ------------------------------------------------------------------------------------- requests


def test_a_trial_takes_three_requests_and_one_for_each_that_leaves_the_front(
    study: GrowingStudy, counting: CountingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_updates, "CURVE_INTERVAL_S", 1e6)
    with Tracker(study.folder) as tracker:
        study.add_result(tracker.on_result)
        wait_until_sent(tracker)
        counting.requests.clear()
        left = 0
        for _ in range(15):
            before = set(study.progress.front)
            study.add_result(tracker.on_result)
            left += len(before - set(study.progress.front))
            wait_until_sent(tracker)
        assert left >= 1, "no trial left the front"
        assert counting.requests == {
            "create_run": 15, "set_terminated": 15, "log_batch": 15 + left
        }  # fmt: skip
        assert finish(tracker, study)
    study.check_runs()


@pytest.mark.parametrize("after", [False, True], ids=["lost request", "lost answer"])
@pytest.mark.parametrize("method", ["create_run", "log_batch", "set_terminated"])
def test_a_failed_request_is_repeated_without_a_second_run(
    study: GrowingStudy, counting: CountingClient, notices: Notices, method: str, after: bool
) -> None:
    calls: Counter[str] = Counter()

    def fault(name: str, args: tuple[Any, ...], done: bool) -> None:
        if name == method and done == after:
            calls[name] += 1
            if calls[name] % 3 == 0:
                raise ConnectionError("cut off")

    with Tracker(study.folder, notify=notices.add) as tracker:
        study.add_result(tracker.on_result)
        wait_until_sent(tracker)
        counting.fault = fault
        for _ in range(6):
            study.add_result(tracker.on_result)
            wait_until_sent(tracker)
        counting.fault = lambda *_: None
        assert finish(tracker, study)
    assert calls[method] >= 6
    study.check_runs()
    assert notices.events[:2] == [Event.UNAVAILABLE, Event.AVAILABLE]


def test_a_rejected_run_does_not_block_others(
    study: GrowingStudy, counting: CountingClient, notices: Notices
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    rejected: list[str] = []

    def fault(name: str, args: tuple[Any, ...], done: bool) -> None:
        if name == "create_run":
            return
        if name == "log_batch" and any(p.value == "32" for p in args[2]) or args[0] in rejected:
            if args[0] not in rejected:
                rejected.append(args[0])
            if name == "log_batch":
                raise MlflowException("a bad value", error_code=INVALID_PARAMETER_VALUE)

    counting.fault = fault
    with Tracker(study.folder, notify=notices.add) as tracker:
        for _ in range(3):
            study.add_result(tracker.on_result)
        assert finish(tracker, study)
    runs = study.runs()
    assert [runs[t].info.status for t in (None, 0, 1, 2)] == [
        "FINISHED", "FINISHED", "FAILED", "FINISHED"
    ]  # fmt: skip
    assert notices.events == [Event.REFUSED] and "a bad value" in notices[0]


# -------------------------------------------------------------------------- states of the study


def test_continuing_a_study_adds_its_new_trials(study: GrowingStudy) -> None:
    for ended in ("6 trials measured", "12 trials measured"):
        with Tracker(study.folder) as tracker:
            for _ in range(6):
                study.add_result(tracker.on_result)
            assert finish(tracker, study, ended)
    assert study.check_runs()[None].data.tags["reason"] == "12 trials measured"


def test_an_interrupted_search_leaves_no_run_running(study: GrowingStudy) -> None:
    with pytest.raises(KeyboardInterrupt), Tracker(study.folder) as tracker:
        study.add_result(tracker.on_result)
        wait_until_sent(tracker)
        assert study.runs()[None].info.status == "RUNNING"
        raise KeyboardInterrupt
    study.check_runs(status="KILLED")


def test_sync_is_refused_while_a_search_sends(
    study: GrowingStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "LOCK_TIMEOUT_S", 0.2)
    study.add_result()
    study.add_result()
    sync.sync(study.folder)
    client = open_client(tracking_uri(study.folder, None))
    client.update_run(study.runs()[1].info.run_id, status="RUNNING")
    with Tracker(study.folder) as tracker:
        study.add_result(tracker.on_result)
        wait_until_sent(tracker)
        runs = study.runs()
        assert runs[None].info.status == "RUNNING" and runs[1].info.status == "FINISHED"
        with refused(Code.BUSY, UserError, study="deit-s"):
            sync.sync(study.folder)
        assert finish(tracker, study)
    study.check_runs()


def test_the_reason_of_an_older_search_does_not_outlive_it(study: GrowingStudy) -> None:
    study.add_result()
    with study.folder.lock.hold():
        sync.sync(study.folder)
    study.add_result()
    assert study.runs()[None].info.status == "KILLED"
    with Tracker(study.folder) as tracker:
        tracker.on_result(None, study.progress)
        assert finish(tracker, study, "2 trials measured")
    assert study.check_runs()[None].data.tags["reason"] == "2 trials measured"
    study.add_result()  # continued without a tracker
    study.folder.write_job(JobRequest({"trials": 3}))
    sync.sync(study.folder)
    assert study.check_runs()[None].data.tags["reason"] == "3 trials measured"
