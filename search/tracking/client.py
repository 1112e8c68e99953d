"""Where MLflow lies and how it is reached: a store's database, and a client that gives up soon.

A store's own database is built aside and put in place whole, under a lock: MLflow's migrations are
not atomic on SQLite, and one that is cut short, or meets another, spoils the file for good.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vitpareto.search.errors import UserError
from vitpareto.search.files.locks import locked

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

#: seconds until a request is given up, and how often it is repeated (MLflow: 120 and 7, which is
#: four minutes for every call to a server that is away)
TIMEOUT_S, RETRIES = 5, 1
#: seconds that SQLite waits for another process that writes
BUSY_S = 5.0

log = logging.getLogger("vitpareto")


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
    """Build STORE/mlflow.db if it is not there, whole or not at all; OSError where it cannot. One
    of an older MLflow is migrated, and stays as it was beside it; UserError where one is newer.
    """
    path = database(store)
    if path.exists():
        _migrate(store)
        return
    store.mkdir(parents=True, exist_ok=True)
    with _aside(store) as partial:
        if path.exists():
            return
        # any question builds the tables
        _client(_address(partial)).search_experiments()
        partial.rename(path)


@contextlib.contextmanager
def _aside(store: Path) -> Iterator[Path]:
    """A name to make a database under, one process at a time: nothing is left of it that was not
    renamed, also not by a process that was killed here.
    """
    with locked(store / "mlflow.lock"):
        for left in store.glob(".mlflow.db.*"):
            left.unlink(missing_ok=True)
        partial = store.absolute() / f".mlflow.db.{uuid.uuid4().hex}"
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _migrate(store: Path) -> None:
    """Bring an older MLflow's database up to this one's: aside, then put in its place whole."""
    path = database(store)
    found, newest, known = _revision(path), *_revisions()
    if found is None or found == newest:
        return  # what cannot be read, MLflow has something to say about
    if found not in known:
        raise UserError(
            f"{path} was written by a newer MLflow (its schema is {found}, this one knows up to "
            f"{newest}): install that one, or move the file away and vitpareto sync each study"
        )
    with _aside(store) as partial:
        if _revision(path) != found:
            return  # another process was faster
        kept = path.with_name(f"mlflow.db.{found}.bak")
        for copy in (kept, partial):
            with (
                contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as old,
                contextlib.closing(sqlite3.connect(copy)) as new,
            ):
                old.backup(new)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "mlflow", "db", "upgrade", _address(partial)],
            capture_output=True, text=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        if done.returncode != 0 or _revision(partial) != newest:
            raise UserError(
                f"{path} is of an older MLflow (schema {found}) and could not be migrated: "
                f"{done.stderr.strip()[-400:]}"
            )
        partial.rename(path)
    log.warning(
        "%s was of an older MLflow and has been migrated; as it was: %s", path.name, kept.name
    )


def _revision(path: Path) -> str | None:
    """The schema that a database has; None where it says nothing of it."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


@functools.cache
def _revisions() -> tuple[str, frozenset[str]]:
    """The newest schema of the MLflow installed here, and all that it knows."""
    from alembic.script import ScriptDirectory

    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations
    place = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations"
    script = ScriptDirectory(str(place))
    (newest,) = script.get_heads()
    return newest, frozenset(one.revision for one in script.walk_revisions())


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
