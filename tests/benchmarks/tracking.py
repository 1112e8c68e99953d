"""Milliseconds that MLflow takes for one trial, on SQLite and over HTTP, replaying a real study.

    python tests/benchmarks/tracking.py studies/demo

Every round makes the study anew in an empty database (`sync` from nothing: the same three calls a
trial as while searching); SQLite and HTTP take turns. The search itself waits for none of it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from vitpareto.dashboards.mlflow_server import serve
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.sync import sync

ROUNDS = 5


def once(folder: StudyFolder, uri: str) -> float:
    """ms a trial of the study sent to an empty place; runs made before by it are deleted first."""
    client = open_client(uri)
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], max_results=1000):
            client.delete_run(run.info.run_id)
    begin = time.perf_counter()
    report = sync(folder, uri)
    seconds = time.perf_counter() - begin
    assert report.created == len(folder.trials.all()) + 1, report
    return 1e3 * seconds / len(folder.trials.all())


def main() -> None:
    place = Path(sys.argv[1])
    folder = StudyFolder.find(str(place.parent), place.name)
    print(f"{len(folder.trials.all())} trials of {folder.name}, {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch)) as served:
        places = {"SQLite": f"sqlite:///{scratch}/own.db", "HTTP": served.url}
        for uri in places.values():
            once(folder, uri)  # builds the tables, imports MLflow
        taken = {name: [] for name in places}
        for _ in range(ROUNDS):
            for name, uri in places.items():
                taken[name].append(once(folder, uri))
    for name, ms in taken.items():
        spread = f"({min(ms):.1f}–{max(ms):.1f})"
        print(f"{name:<7} median {statistics.median(ms):5.1f} ms a trial {spread}")


if __name__ == "__main__":
    main()
