"""`sync` makes a server equal to a study from any state, and changes nothing the second time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.refusals import refused
from tests.search.tracking.conftest import CountingClient
from tests.search.tracking.studies import OBJECTIVES, GrowingStudy, finish
from vitpareto.search.errors import Code, UserError
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.outbox import outbox_path
from vitpareto.search.tracking.page import StudyPage
from vitpareto.search.tracking.reconcile import SyncReport
from vitpareto.search.tracking.run_contents import STUDY_ID_TAG, hypervolume_curve
from vitpareto.search.tracking.server_address import tracking_uri
from vitpareto.search.tracking.sync import sync
from vitpareto.search.tracking.tracker import Tracker


def test_a_second_sync_changes_nothing(study: GrowingStudy, counting: CountingClient) -> None:
    for _ in range(8):
        study.add_result()
    assert sync(study.folder, page=study.page()) == SyncReport(created=9)
    study.check_runs(status="KILLED")
    counting.requests.clear()
    assert sync(study.folder, page=study.page()) == SyncReport(unchanged=9)
    assert set(counting.requests) <= {
        "get_experiment", "get_experiment_by_name", "search_runs", "get_metric_history",
        "list_artifacts",
    }, "a request that writes"  # fmt: skip


def test_duplicate_runs_are_removed(study: GrowingStudy) -> None:
    study.add_result()
    sync(study.folder)
    run = study.runs()[0]
    client = open_client(tracking_uri(study.folder, None))
    client.create_run(run.info.experiment_id, tags=run.data.tags)
    report = sync(study.folder)
    assert (report.removed, report.unchanged) == (1, 2)
    study.check_runs(status="KILLED")


def test_deleted_runs_experiments_and_databases_are_rebuilt(
    study: GrowingStudy, empty_database: Path
) -> None:
    with Tracker(study.folder) as tracker:
        for _ in range(6):
            study.add_result(tracker.on_result)
        assert finish(tracker, study)
    client = open_client(tracking_uri(study.folder, None))
    client.delete_run(study.runs()[4].info.run_id)
    client.delete_run(study.runs()[None].info.run_id)
    report = sync(study.folder, page=study.page())
    assert (report.created, report.updated) == (2, 5), "the other runs have a new parent"
    study.check_runs()
    client.delete_experiment(study.runs()[0].info.experiment_id)
    sync(study.folder, page=study.page())
    study.check_runs()

    # another database stands for a lost one: the engine of a deleted file stays open
    other = empty_database.with_name("other.db")
    shutil.copy(empty_database, other)
    assert sync(study.folder, f"sqlite:///{other}", study.page()) == SyncReport(created=7)
    runs = study.check_runs(f"sqlite:///{other}")
    assert runs[None].data.tags["reason"] == "all measured"
    assert sync(study.folder, f"sqlite:///{other}", study.page()) == SyncReport(unchanged=7)


def test_runs_of_deleted_trials_are_removed(study: GrowingStudy) -> None:
    for _ in range(3):
        study.add_result()
    sync(study.folder)
    (study.folder.folder / "trials" / "000002.json").unlink()
    assert sync(study.folder).removed == 1
    study.check_runs(status="KILLED")


def test_runs_that_a_killed_process_left_running_are_closed(study: GrowingStudy) -> None:
    study.add_result()
    study.add_result()
    sync(study.folder)
    client = open_client(tracking_uri(study.folder, None))
    for trial in (None, 1):
        client.update_run(study.runs()[trial].info.run_id, status="RUNNING")
    assert sync(study.folder).closed == 2
    study.check_runs(status="KILLED")


def test_a_copied_store_does_not_write_to_the_original(study: GrowingStudy, tmp_path: Path) -> None:
    study.add_result()
    page = study.page()
    sync(study.folder, page=page)
    store = study.folder.folder.parent
    copy = shutil.copytree(store, tmp_path / "copy")
    before = {p: p.read_bytes() for p in store.rglob("*") if p.is_file()}
    copied = StudyFolder(copy / study.folder.name)
    (copied.folder / "front.svg").write_bytes(b"another picture")
    page = StudyPage({"front.svg": copied.folder / "front.svg"}, page.table)
    assert sync(copied, page=page).created == 2
    assert sync(copied, page=page) == SyncReport(unchanged=2)
    assert {p: p.read_bytes() for p in store.rglob("*") if p.is_file()} == before
    assert any(p.read_bytes() == b"another picture" for p in copy.rglob("artifacts/front.svg"))


def test_the_curve_does_not_depend_on_modification_times(study: GrowingStudy) -> None:
    for _ in range(6):
        study.add_result()
    before = hypervolume_curve(study.folder.trials.all(), OBJECTIVES)
    for i, path in enumerate(sorted((study.folder.folder / "trials").glob("*.json"))):
        os.utime(path, (9 - i, 9 - i))
    assert hypervolume_curve(study.folder.trials.all(), OBJECTIVES) == before


def test_the_state_and_outbox_of_version_0_1_0_are_understood(study: GrowingStudy) -> None:
    """The files as that version wrote them: an interrupted search, with another server's lines."""
    for _ in range(3):
        study.add_result()
    (study.folder.folder / "tracking.json").write_text(
        '{"id": "0123456789abcdef0123456789abcdef", "ended": "3 trials measured", "trials": 3}'
    )
    store_lines = [
        json.dumps({"to": tracking_uri(study.folder, None), "trial": 2, "step": 3}),
        json.dumps({"to": tracking_uri(study.folder, None), "ended": "3 trials measured"}),
    ]
    other_line = '{"to": "http://mlflow.example:5000", "trial": 2, "step": 3}'
    outbox_path(study.folder).write_text("\n".join([*store_lines, other_line]) + "\n")
    assert sync(study.folder) == SyncReport(created=4)
    parent = study.check_runs()[None]
    assert parent.data.tags[STUDY_ID_TAG] == "0123456789abcdef0123456789abcdef"
    assert parent.data.tags["reason"] == "3 trials measured"
    assert outbox_path(study.folder).read_text() == other_line + "\n"


# ------------------------------------------------------------------------------ names of stores


@pytest.mark.parametrize("name", ["a b", "a#b", "ü", "a'b;c"])
def test_unusual_names_of_stores_work(tmp_path: Path, empty_database: Path, name: str) -> None:
    store = tmp_path / name
    store.mkdir()
    shutil.copy(empty_database, store / "mlflow.db")
    study = GrowingStudy(store, "s")
    study.add_result()
    assert sync(study.folder).created == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    study.check_runs(status="KILLED")


@pytest.mark.parametrize("name", ["a%20b", "what?"])
def test_names_that_mlflow_misreads_are_refused(tmp_path: Path, name: str) -> None:
    study = GrowingStudy(tmp_path / name, "s")
    for start in (Tracker, sync):
        with refused(Code.UNSUPPORTED, UserError):
            start(study.folder)
