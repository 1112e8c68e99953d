"""Stores with an empty MLflow database, and a client that counts its requests."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.search.tracking.studies import GrowingStudy
from vitpareto.search.tracking import connection, sender
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.notices import Event, Notice
from vitpareto.search.tracking.server_address import tracking_uri


class Notices(list[Notice]):
    """What a tracker reported."""

    def add(self, notice: str) -> None:
        assert isinstance(notice, Notice)
        self.append(notice)

    @property
    def events(self) -> list[Event]:
        return [notice.event for notice in self]


class CountingClient:
    """An MLflow client that counts its requests. `fault(method, args, done)` may raise."""

    def __init__(self, client: Any) -> None:
        self.client, self.requests = client, Counter[str]()
        self.fault: Callable[[str, tuple[Any, ...], bool], None] = lambda *_: None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.requests[name] += 1
            self.fault(name, args, False)
            out = method(*args, **options)
            self.fault(name, args, True)
            return out

        return counted


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables. Creating it takes seconds, so tests copy it."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    open_client(f"sqlite:///{path}")
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    return path


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Path:
    (tmp_path / "studies").mkdir()
    shutil.copy(empty_database, tmp_path / "studies" / "mlflow.db")
    return tmp_path / "studies"


@pytest.fixture
def study(store: Path) -> GrowingStudy:
    return GrowingStudy(store, "deit-s")


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def counting(study: GrowingStudy, monkeypatch: pytest.MonkeyPatch) -> CountingClient:
    client = CountingClient(open_client(tracking_uri(study.folder, None)))
    monkeypatch.setattr(connection, "open_client", lambda uri: client)
    monkeypatch.setattr(sender, "FIRST_RETRY_S", 0.05)
    return client


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
