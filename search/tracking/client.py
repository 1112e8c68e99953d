"""An MLflow client with short timeouts that logs warnings only."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from vitpareto.search.tracking.mlflow_internals import quiet_loggers

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: seconds until a request fails, and how often it is repeated. MLflow's defaults, 120 and 7, block
#: every call to an unreachable server for four minutes.
TIMEOUT_S, RETRIES = 5, 1
#: seconds that SQLite waits for another process that writes
BUSY_TIMEOUT_S = 5.0


def configure_environment() -> None:
    """Set what MLflow reads from the environment on import; variables that are set are kept."""
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT_S),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(RETRIES),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        # prints a line per run, and needs another request per run
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


def new_client(uri: str) -> MlflowClient:
    """A client for an address. Imports mlflow, which takes seconds."""
    configure_environment()
    quiet_loggers()
    from mlflow.tracking import MlflowClient

    # the tracker reports a failure once, not for every attempt
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_client(uri: str) -> MlflowClient:
    """A client for an address.

    Raises:
        OSError: the address is a database file that cannot be opened. MLflow itself would retry for
            minutes. Everything else that MLflow raises is raised.
    """
    if (path := database_file(uri)) is not None:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
                connection.execute("PRAGMA schema_version")
        except sqlite3.Error as error:
            raise OSError(f"{path}: {error}") from None
    return new_client(uri)


def database_file(uri: str) -> Path | None:
    """The file of a SQLite address; None for a server or another kind of database."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])
