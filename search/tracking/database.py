"""The SQLite database and the artifact folder of a store, built and migrated as a whole.

A database is built under another name and renamed when it is complete, under a lock: MLflow's
migrations are not atomic on SQLite, and an interrupted or concurrent migration makes a file
unusable. Never reads or writes runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.locks import locked
from vitpareto.search.tracking.client import BUSY_TIMEOUT_S, new_client
from vitpareto.search.tracking.mlflow_internals import schema_revisions

log = logging.getLogger("vitpareto")


def database(store: Path) -> Path:
    """The database of a store."""
    return store.absolute() / "mlflow.db"


def artifact_folder(store: Path) -> Path:
    """The folder with the artifacts of a store's runs."""
    return store.absolute() / "mlartifacts"


def store_uri(store: Path) -> str:
    """The address of a store's database.

    Raises:
        UserError: the path contains % or ?, which MLflow does not read consistently.
    """
    return sqlite_uri(database(store))


def sqlite_uri(path: Path) -> str:
    """The address of a database file. Raises as `store_uri`."""
    if set("%?") & set(str(path)):
        raise UserError(
            f"the path of MLflow's database must not contain % or ? (got {path}): use another "
            "--store, a server with --tracking-uri, or --tracking-uri none",
            Code.UNSUPPORTED,
            path=str(path),
        )
    return f"sqlite:///{path}"


def ensure_database(store: Path) -> None:
    """Create STORE/mlflow.db if it does not exist, or migrate it to the installed MLflow.

    Before a migration the database is copied to STORE/mlflow.db.REVISION.bak.

    Raises:
        UserError: the database was written by a newer MLflow, or the migration failed.
        OSError: the database cannot be created.
    """
    path = database(store)
    if path.exists():
        _migrate(store)
        return
    store.mkdir(parents=True, exist_ok=True)
    with _partial_database(store) as partial:
        if not path.exists():
            new_client(sqlite_uri(partial)).search_experiments()  # any request creates the tables
            partial.rename(path)


@contextlib.contextmanager
def _partial_database(store: Path) -> Iterator[Path]:
    """A path to build a database at, for one process at a time.

    Removes what is left at the end of the block, and what a killed process has left.
    """
    with locked(store / "mlflow.lock"):
        for leftover in store.glob(".mlflow.db.*"):
            leftover.unlink(missing_ok=True)
        partial = store.absolute() / f".mlflow.db.{uuid.uuid4().hex}"
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def _migrate(store: Path) -> None:
    path = database(store)
    revision, newest, known = schema_revision(path), *schema_revisions()
    if revision is None or revision == newest:
        return  # MLflow itself reports a file that cannot be read
    if revision not in known:
        raise UserError(
            f"{path} was written by a newer MLflow (schema {revision}; the installed one supports "
            f"up to {newest}): upgrade mlflow, or move the file away and run vitpareto sync for "
            "each study",
            Code.UNSUPPORTED,
            path=str(path),
            revision=revision,
        )
    with _partial_database(store) as partial:
        if schema_revision(path) != revision:
            return  # migrated by another process
        backup = path.with_name(f"mlflow.db.{revision}.bak")
        for copy in (backup, partial):
            with (
                contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as old,
                contextlib.closing(sqlite3.connect(copy)) as new,
            ):
                old.backup(new)
        # -P: modules of the working directory must not replace those that MLflow imports
        command = [sys.executable, "-P", "-W", "ignore", "-m", "mlflow", "db", "upgrade"]
        upgrade = subprocess.run(
            [*command, sqlite_uri(partial)],
            capture_output=True,
            text=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )
        if upgrade.returncode != 0 or schema_revision(partial) != newest:
            raise UserError(
                f"{path} could not be migrated from schema {revision} of an older MLflow: "
                f"{upgrade.stderr.strip()[-400:]}",
                Code.UNREADABLE,
                path=str(path),
                revision=revision,
            )
        partial.rename(path)
    log.warning(
        "%s was migrated from the schema of an older MLflow; the original file is %s",
        path.name,
        backup.name,
    )


def schema_revision(path: Path) -> str | None:
    """The schema revision of a database, or None if it cannot be read."""
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])
