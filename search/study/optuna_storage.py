"""Optuna's storage of a study: a journal in its folder, or a database that the job names.

The storage is not the truth: the folder's results are. A storage that was lost is filled from them
(`optuna_trials.OptunaTrials.restore`), except for the sampler's queue.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.atomic import retry_while_disk_full, write_atomic
from vitpareto.search.study.database_address import check_url
from vitpareto.search.study.folder import StudyFolder


class _Journal(JournalFileBackend):
    """Optuna's journal; a partial line is removed if a write fails, and a full disk is awaited."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        def append() -> None:
            # no other process writes: the driver holds the study's lock
            size = os.path.getsize(self.path)
            try:
                super(_Journal, self).append_logs(logs)
            except OSError:
                os.truncate(self.path, size)
                raise

        retry_while_disk_full(self.path, append)


def open_storage(folder: StudyFolder, url: str | None = None) -> optuna.storages.BaseStorage:
    """Open the storage, for the driver that holds the study's lock.

    Args:
        folder: the study.
        url: of a database; None for the journal in the folder, which is repaired if its last
            writer was killed.

    Raises:
        UserError: the study uses another storage, or the database cannot be reached.
    """
    database = _database_record(folder)
    stored = database["url"] if database else None
    if (database or folder.journal.exists()) and stored != url:
        raise UserError(
            f"job.storage must stay {_described(stored)} for study {folder.name!r} (got "
            f"{_described(url)})",
            Code.MISMATCH, study=folder.name, accepted=stored, got=url,
        )  # fmt: skip
    if url is None:
        _repair(folder.journal)
        return optuna.storages.JournalStorage(_Journal(folder.journal))
    storage = _open_database(url)
    if database is None:
        # a unique name: other users of the database may have a study of the same name
        name = f"{folder.name}-{uuid.uuid4().hex[:12]}"
        write_atomic(folder.database, json.dumps({"url": url, "study": name}))
    return storage


def _repair(journal: Path) -> None:
    """Remove stale locks and a partial last line."""
    for stale in journal.parent.glob(f"{journal.name}.lock*"):
        stale.unlink(missing_ok=True)
    if not journal.exists():
        return
    data = journal.read_bytes()
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
        with open(journal, "r+b") as handle:
            handle.truncate(complete)
            handle.flush()
            os.fsync(handle.fileno())


def study_name(folder: StudyFolder) -> str:
    """Return the study's name in its storage."""
    database = _database_record(folder)
    return folder.name if database is None else database["study"]


def frozen_trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    """Return Optuna's trials. Read-only."""
    database = _database_record(folder)
    if database is None and not folder.journal.exists():
        return []
    storage: optuna.storages.BaseStorage
    if database is not None:
        storage = _open_database(database["url"])
    else:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
    try:
        study = optuna.load_study(study_name=study_name(folder), storage=storage)
        return study.get_trials(deepcopy=False)
    finally:
        close(storage)


def close(storage: optuna.storages.BaseStorage) -> None:
    """Close a database's connections."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _open_database(url: str) -> optuna.storages.RDBStorage:
    from sqlalchemy.exc import SQLAlchemyError

    check_url(url)
    try:
        # pre-ping reopens a connection that the server closed
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UserError(
            f"the driver for job.storage {url!r} must be installed ({error}): run pip install "
            "'vitpareto[postgres]' for postgresql+psycopg://",
            Code.UNAVAILABLE, url=url,
        ) from error  # fmt: skip
    except SQLAlchemyError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"job.storage {url!r} cannot be used: {reason}", Code.UNAVAILABLE, url=url
        ) from error


def _database_record(folder: StudyFolder) -> dict[str, str] | None:
    """Return the database's address and the study's name in it; None if it is the journal."""
    path = folder.database
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _described(url: str | None) -> str:
    return "the journal in the study's folder" if url is None else url
