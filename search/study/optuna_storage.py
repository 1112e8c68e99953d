"""Optuna's storage of a study: a journal in its folder, or a database that the job names.

Neither is the truth: that is the folder's results. A storage that was lost is filled again from
them (`FrontSearcher`), except for what the sampler was going to propose.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import retry_while_disk_full, write_atomic
from vitpareto.search.study.database_address import check_url
from vitpareto.search.study.folder import StudyFolder


class _Journal(JournalFileBackend):
    """Optuna's journal, of which nothing half-written stays. A full disk is waited for."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        def append() -> None:
            # only the driver writes, and it holds the study's lock
            whole = os.path.getsize(self._file_path)
            try:
                super(_Journal, self).append_logs(logs)
            except OSError:
                os.truncate(self._file_path, whole)
                raise

        retry_while_disk_full(Path(self._file_path), append)


def open_storage(folder: StudyFolder, url: str | None = None) -> optuna.storages.BaseStorage:
    """For the driver that holds the study's lock. url: of a database; None: the folder's journal,
    repaired after a kill: a half-written last line and a stale lock go.

    UserError where a database cannot be reached, or the study keeps its trials elsewhere.
    """
    held = _held(folder)
    journal = folder.journal
    there = held["url"] if held else None
    if (held or journal.exists()) and there != url:
        raise UserError(
            f"study {folder.name} keeps Optuna's trials in {_said(there)}, and job.storage is "
            f"{_said(url)}: leave it as it was"
        )
    if url is not None:
        storage = _database(url)
        if held is None:
            # its name alone may be taken in a database that others use
            name = f"{folder.name}-{uuid.uuid4().hex[:12]}"
            write_atomic(folder.database, json.dumps({"url": url, "study": name}))
        return storage
    for stale in journal.parent.glob(f"{journal.name}.lock*"):
        stale.unlink(missing_ok=True)
    if journal.exists():
        data = journal.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(journal, "r+b") as handle:
                handle.truncate(whole)
                handle.flush()
                os.fsync(handle.fileno())
    return optuna.storages.JournalStorage(_Journal(str(journal)))


def study_name(folder: StudyFolder) -> str:
    """What the study is called in its storage."""
    held = _held(folder)
    return folder.name if held is None else held["study"]


def frozen_trials(folder: StudyFolder) -> list[optuna.trial.FrozenTrial]:
    """Optuna's trials as they stand; nothing is written."""
    held = _held(folder)
    if held is None and not folder.journal.exists():
        return []
    storage: optuna.storages.BaseStorage
    if held is not None:
        storage = _database(held["url"])
    else:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
    try:
        study = optuna.load_study(study_name=study_name(folder), storage=storage)
        return study.get_trials(deepcopy=False)
    finally:
        close(storage)


def close(storage: optuna.storages.BaseStorage) -> None:
    """Leave a database's connections."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _database(url: str) -> optuna.storages.RDBStorage:
    from sqlalchemy.exc import SQLAlchemyError

    check_url(url)
    try:
        # pre-ping: a connection that the server closed meanwhile is opened again
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UserError(
            f"job.storage is {url!r}, and its driver is not installed ({error}): "
            "pip install 'vitpareto[postgres]' brings PostgreSQL's, for postgresql+psycopg://…"
        ) from error
    except SQLAlchemyError as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"job.storage {url!r} cannot be used: {why}") from error


def _held(folder: StudyFolder) -> dict[str, str] | None:
    path = folder.database
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _said(url: str | None) -> str:
    return "the study's folder" if url is None else url
