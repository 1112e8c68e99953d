"""Where MLflow lies and how it is reached: a store's database, and a client that gives up soon.

A store's own database is built aside and put in place whole, under a lock: MLflow's migrations are
not atomic on SQLite, and one that is cut short, or meets another, spoils the file for good.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: seconds until a request is given up, and how often it is repeated (MLflow: 120 and 7, which is
#: four minutes for every call to a server that is away)
TIMEOUT_S, RETRIES = 5, 1
#: seconds that SQLite waits for another process that writes
BUSY_S = 5.0


def database(store: Path) -> Path:
    """A store's own database."""
    return store.absolute() / "mlflow.db"


def store_uri(store: Path) -> str:
    """Its address. UserError for a path that cannot be one: MLflow reads % and ? in two ways."""
    return _address(database(store))


def _address(path: Path) -> str:
    if set("%?") & set(str(path)):
        raise UserError(
            f"MLflow cannot keep its database at {path}, where a % or ? is part of the path: name "
            "another --store, a server as --tracking-uri, or --tracking-uri none"
        )
    return f"sqlite:///{path}"


def artifacts(store: Path) -> Path:
    """Where the files of a store's runs lie."""
    return store.absolute() / "mlartifacts"


def ensure_database(store: Path) -> None:
    """Build STORE/mlflow.db if it is not there, whole or not at all; OSError where it cannot be."""
    path = database(store)
    if path.exists():
        return
    store.mkdir(parents=True, exist_ok=True)
    with open(store / "mlflow.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        for left in store.glob(".mlflow.db.*"):  # by a process that was killed here
            left.unlink(missing_ok=True)
        partial = store.absolute() / f".mlflow.db.{uuid.uuid4().hex}"
        # any question builds the tables
        _client(_address(partial)).search_experiments()
        partial.rename(path)


def open_client(uri: str) -> MlflowClient:
    """A client that gives up soon and says nothing. Raises what MLflow raises, and at once an
    OSError where a database file cannot be opened (MLflow would try for minutes).
    """
    path = _file_of(uri)
    if path is not None:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
                connection.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise OSError(f"{path}: {error}") from None
    return _client(uri)


def _file_of(uri: str) -> Path | None:
    """The database file of an address; None for a server or another kind of database."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def quiet() -> None:
    """What MLflow reads when it is imported: give up soon, send nobody anything, say little."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT_S),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(RETRIES),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # it would print a line a run, and ask the server for the run once more to do so
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


def _client(uri: str) -> MlflowClient:
    """MLflow is imported here: that takes seconds, and the search's thread need not wait."""
    quiet()
    import mlflow.store.db.utils  # sets a level of its own
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", mlflow.store.db.utils.__name__):
        logging.getLogger(name).setLevel(logging.WARNING)
    # what fails is said once, by the tracker, and not for every attempt
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)
