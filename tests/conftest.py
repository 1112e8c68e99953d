"""What several tests share: a private Ray on loopback and one cache of decoded images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import command, made_study, own_store, study_store
from vitpareto.clusters.connect import ClusterCapacity, local_cluster

__all__ = ["cache", "capacity", "command", "made_study", "own_store", "study_store"]

# tests must not contact the user's servers
for name in ("MLFLOW_TRACKING_URI", "VITPARETO_STORE"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoded images, shared by the whole run and gone after it."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def capacity() -> Iterator[ClusterCapacity]:
    """A private Ray on loopback for the tests of one file."""
    with local_cluster(2) as capacity:
        yield capacity
