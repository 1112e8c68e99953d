"""What several tests share: a private Ray on loopback and one cache of decoded images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import command, made_study, own_store, shared_folder, study_store
from vitpareto.clusters.connect import ClusterCapacity, local_cluster

__all__ = ["cache", "capacity", "command", "made_study", "own_store", "study_store"]

#: files that take a minute or more. They come first, so that the workers of pytest-xdist end
#: together; those that start a cluster, of which a machine has one at a time, stand apart.
LONG = (
    "clusters/test_local_nodes.py",
    "search/trials/test_faults.py",
    "search/trials/test_run.py",
    "search/trials/test_trained_search.py",
    "test_foreign_folder.py",
    "search/trials/test_made_up_methods.py",
    "search/export/test_deploy.py",
    "search/trials/test_distributed.py",
    "search/trials/test_early_stopping.py",
    "search/trials/test_certification.py",
    "search/export/test_bundle.py",
    "clusters/test_object_storage.py",
    "dashboards/test_study_commands.py",
)
#: seconds that a test of these files may take, with other work on the machine
LONG_S = 900

# tests must not contact the user's servers
for name in ("MLFLOW_TRACKING_URI", "VITPARETO_STORE"):
    os.environ.pop(name, None)
# commands that tests start: threads of tiny models wait for each other longer than they work
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `LONG` first, leave the others in their order, and give what may take
    minutes on a busy machine the time for it.
    """
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
    for item in items:
        takes_long = item.path in place or "made_study" in getattr(item, "fixturenames", ())
        if takes_long and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LONG_S))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images, shared by the whole run and all its workers, and gone after it."""
    folder = shared_folder(tmp_path_factory) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def capacity() -> Iterator[ClusterCapacity]:
    """A private Ray on loopback for the tests of one file."""
    with local_cluster(2) as capacity:
        yield capacity
