"""Servers that stop, refuse, answer slowly or never: the search goes on, and `sync` restores."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.refusals import refused
from tests.search.tracking.conftest import Notices
from tests.search.tracking.studies import GrowingStudy, finish, wait_until_sent
from vitpareto.dashboards.mlflow_server import serve
from vitpareto.search.errors import Code, UserError
from vitpareto.search.tracking import sender
from vitpareto.search.tracking.notices import Event
from vitpareto.search.tracking.outbox import outbox_path
from vitpareto.search.tracking.reconcile import SyncReport
from vitpareto.search.tracking.study_runs import StudyRuns
from vitpareto.search.tracking.sync import sync
from vitpareto.search.tracking.tracker import Tracker


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`finish` ends because an attempt failed, not because time passed."""
    monkeypatch.setattr(sender, "FINISH_TIMEOUT_S", 1e6)
    monkeypatch.setattr(sender, "FINISH_NOTICE_S", 1e6)


@pytest.mark.slow
def test_a_server_that_was_killed_gets_the_rest_when_it_is_back(
    study: GrowingStudy, notices: Notices, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MAX_RETRY_S", 1.0)
    store, uri = study.folder.folder.parent, f"http://127.0.0.1:{free_port}"
    with Tracker(study.folder, uri, notify=notices.add) as tracker:
        with serve(store, port=free_port):
            for _ in range(4):
                study.add_result(tracker.on_result)
            wait_until_sent(tracker)
        for _ in range(4):
            study.add_result(tracker.on_result)
        lines = outbox_path(study.folder).read_text().splitlines()
        assert [json.loads(line)["trial"] for line in lines][-4:] == [4, 5, 6, 7]
        with serve(store, port=free_port):
            wait_until_sent(tracker)
            study.add_result(tracker.on_result)
            assert finish(tracker, study)
            study.check_runs(uri)
            assert sync(study.folder, uri, study.page()) == SyncReport(unchanged=10)
    assert notices.events == [Event.UNAVAILABLE, Event.AVAILABLE]


@pytest.mark.usefixtures("patient")
def test_a_server_that_is_away_is_reported_twice_and_sync_restores(
    study: GrowingStudy, notices: Notices, free_port: int
) -> None:
    uri = f"http://someone:secret@127.0.0.1:{free_port}"
    with Tracker(study.folder, uri, notify=notices.add) as tracker:
        for _ in range(3):
            study.add_result(tracker.on_result)
        assert not finish(tracker, study)
    assert notices.events == [Event.UNAVAILABLE, Event.NOT_SENT]
    assert "secret" not in " ".join(notices)
    assert outbox_path(study.folder).stat().st_size > 0
    with refused(Code.UNAVAILABLE, UserError, server=f"http://127.0.0.1:{free_port}"):
        sync(study.folder, uri)
    assert sync(study.folder, page=study.page()).created == 4
    study.check_runs()
    lines = outbox_path(study.folder).read_text()
    assert len(lines.splitlines()) == 4, "the other server has nothing yet"
    assert "secret" not in lines


def test_finish_does_not_wait_for_a_slow_server(
    study: GrowingStudy, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "FINISH_TIMEOUT_S", 0.5)
    monkeypatch.setattr(sender, "FINISH_NOTICE_S", 0.05)
    answer = threading.Event()
    put = StudyRuns.put
    monkeypatch.setattr(StudyRuns, "put", lambda self, spec: (answer.wait(), put(self, spec))[1])
    tracker = Tracker(study.folder, notify=notices.add)
    for _ in range(12):
        study.add_result(tracker.on_result)
    assert not finish(tracker, study)
    assert notices.events == [Event.SENDING, Event.NOT_SENT]
    monkeypatch.undo()
    answer.set()
    sync(study.folder, page=study.page())
    study.check_runs()


@pytest.mark.usefixtures("patient")
def test_a_database_that_cannot_be_opened_is_reported(
    study: GrowingStudy, notices: Notices
) -> None:
    uri = f"sqlite:///{study.folder.folder}/no/such/folder/x.db"
    with Tracker(study.folder, uri, notify=notices.add) as tracker:
        study.add_result(tracker.on_result)
        assert not finish(tracker, study)
    with refused(Code.UNAVAILABLE, UserError, server=uri):
        sync(study.folder, uri)
    assert notices.events == [Event.UNAVAILABLE, Event.NOT_SENT]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.usefixtures("patient")
def test_results_do_not_wait_for_a_server_that_never_answers(
    study: GrowingStudy, silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = Tracker(study.folder, silent_server, notify=lambda _: None)
    for _ in range(60):
        study.add_result(tracker.on_result)
    assert tracker.pending == 60
    assert not finish(tracker, study)
    assert sync(study.folder, page=study.page()).created == 61


@pytest.mark.usefixtures("patient")
def test_an_invalid_server_address_is_reported(study: GrowingStudy, notices: Notices) -> None:
    with Tracker(study.folder, "gopher://x", notify=notices.add) as tracker:
        study.add_result(tracker.on_result)
        assert not finish(tracker, study)
    assert notices.events == [Event.UNAVAILABLE, Event.NOT_SENT]
    assert "gopher" in notices[0]
