"""The results of a study's trials on disk: one file per trial, written atomically.

TRIALS/NUMBER.json   the result of a trial
BY_KEY/KEY.json      the first measurement of a candidate, so that it is not measured again
EPOCH                the session of the driver whose workers may write
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.write_through import (
    fetch_if_missing,
    list_files,
    object_store_of,
    refresh,
)
from vitpareto.search.study.results import TrialResult

#: Names of result files.
PATTERN = "[0-9]*.json"


class StaleWorker(RuntimeError):
    """A worker of an earlier driver tried to write a result.

    Attributes:
        trial: number of the trial, which the current driver runs again.
        study: name of the study.
    """

    def __init__(self, trial: int, study: str) -> None:
        super().__init__(f"trial {trial} belongs to an earlier session of study {study!r}")
        self.trial, self.study = trial, study

    def __reduce__(self) -> tuple[type[StaleWorker], tuple[int, str]]:
        return type(self), (self.trial, self.study)


def read_result(path: Path) -> TrialResult:
    """Read a result file."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    # early versions did not store the time: the file's time stands for it
    stored.setdefault("ended_ms", path.stat().st_mtime_ns // 10**6)
    return TrialResult.from_json(stored)


def read_results(folder: Path) -> list[TrialResult]:
    """Read all result files of a folder, by trial number."""
    return [read_result(path) for path in list_files(folder, PATTERN)]


def result_path(folder: Path, trial: int) -> Path:
    """Return the path of a trial's result file in a folder."""
    return folder / f"{trial:06d}.json"


def write_result(folder: Path, result: TrialResult) -> None:
    """Write a result file."""
    write_atomic(result_path(folder, result.trial), json.dumps(result.to_json()))


@dataclass(frozen=True)
class TrialFiles:
    """The results of a study's trials.

    Attributes:
        folder: the study's folder.
    """

    folder: Path

    @property
    def path(self) -> Path:
        """The folder of the result files."""
        return self.folder / "trials"

    def write(self, result: TrialResult, epoch: str | None = None) -> None:
        """Make a result durable.

        Args:
            result: the result.
            epoch: session of the driver that started the worker; None for the driver itself.

        Raises:
            StaleWorker: another driver started since, and runs the trial again.
        """
        if epoch is not None and self.epoch() != epoch:
            raise StaleWorker(result.trial, self.folder.name)
        write_result(self.path, result)
        if result.state != "failed":
            self._write_by_key(result)

    def _write_by_key(self, result: TrialResult) -> None:
        """Record the candidate's first measurement."""
        path, by_key = result_path(self.path, result.trial), self._by_key(result.key)
        text = json.dumps(result.to_json())
        if object_store_of(by_key) is not None:
            if not fetch_if_missing(by_key):
                write_atomic(by_key, text)
            return
        try:
            os.link(path, by_key)
        except FileExistsError:
            pass  # the first measurement stays
        except OSError:  # a file system without hard links
            write_atomic(by_key, text)

    def all(self) -> list[TrialResult]:
        """Return all results, by trial number."""
        return read_results(self.path)

    def count(self) -> int:
        """Return the number of results."""
        return len(list_files(self.path, PATTERN))

    def get(self, trial: int) -> TrialResult | None:
        """Return a trial's result; None if it has none."""
        path = result_path(self.path, trial)
        return read_result(path) if fetch_if_missing(path) else None

    def by_key(self, key: str) -> TrialResult | None:
        """Return the first measurement of a candidate, in full or stopped early; None if none."""
        path = self._by_key(key)
        return read_result(path) if fetch_if_missing(path) else None

    def _by_key(self, key: str) -> Path:
        return self.folder / "by_key" / f"{key}.json"

    def epoch(self) -> str:
        """Return the current driver's session; "" before the first."""
        path = self.folder / "epoch"
        refresh(path)
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def start_epoch(self, epoch: str) -> None:
        """Start a session, by the driver that holds the lock: only its workers may write now."""
        write_atomic(self.folder / "epoch", epoch)
