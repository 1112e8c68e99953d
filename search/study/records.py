"""What a study stores beside its trials: latencies, preparations, certification and recovery."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.measure.latency import Latency
from vitpareto.search.study.certification_record import CertificationRecord
from vitpareto.search.study.identity import described, differing
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.trial_files import PATTERN, read_results, write_result
from vitpareto.search.training.preparation_cache import PreparationRecord
from vitpareto.search.training.settings import TrainingSettings


def _read(path: Path) -> Any:
    """Return the JSON of a file; None if the file does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class LatencyFile:
    """latency.json: the latencies of the front's members, by trial."""

    path: Path

    def read(self) -> dict[int, Latency]:
        return {
            int(trial): Latency.from_json(timed)
            for trial, timed in (_read(self.path) or {}).items()
        }

    def write(self, latencies: Mapping[int, Latency]) -> None:
        plain = {str(trial): timed.to_json() for trial, timed in sorted(latencies.items())}
        write_atomic(self.path, json.dumps(plain, indent=1))


@dataclass(frozen=True)
class PreparationsFile:
    """prepared.json: the preparations that trials share."""

    path: Path

    def read(self) -> list[PreparationRecord]:
        return [PreparationRecord.from_json(stored) for stored in _read(self.path) or []]

    def write(self, preparations: Sequence[PreparationRecord]) -> None:
        plain = [record.to_json() for record in preparations]
        write_atomic(self.path, json.dumps(plain, indent=1))


@dataclass(frozen=True)
class CertificationFiles:
    """The results on held-out images, and the record of which images and trials these are.

    Attributes:
        folder: `certified` of the study, or of its recovered trials.
    """

    folder: Path

    def read(self) -> CertificationRecord | None:
        """Return the record; None if nothing is certified."""
        stored = _read(self.folder / "certification.json")
        return None if stored is None else CertificationRecord.from_json(stored)

    def write(self, record: CertificationRecord) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "certification.json", json.dumps(record.to_json()))

    def results(self) -> list[TrialResult]:
        """Return the results on held-out images, under the trials' numbers."""
        return read_results(self.folder)

    def write_result(self, result: TrialResult) -> None:
        write_result(self.folder, result)


@dataclass(frozen=True)
class RecoverySettings:
    """What all results of a recovery share.

    Attributes:
        training: settings of the fine-tuning.
        train_fingerprint: of the training images.
    """

    training: TrainingSettings
    train_fingerprint: str

    def to_json(self) -> dict[str, Any]:
        """The settings for a file: the training's keys, then the fingerprint."""
        return {**self.training.to_json(), "train_fingerprint": self.train_fingerprint}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RecoverySettings:
        """The inverse of `to_json`."""
        return cls(TrainingSettings.from_json(stored), stored["train_fingerprint"])


@dataclass(frozen=True)
class RecoveryFiles:
    """The front's trials after fine-tuning, under their own numbers, and its settings.

    Attributes:
        folder: `recovered` of the study.
    """

    folder: Path

    @property
    def _settings_file(self) -> Path:
        return self.folder / "recovery.json"

    def settings(self) -> RecoverySettings | None:
        """Return the settings of the recovery; None if the study was not recovered."""
        stored = _read(self._settings_file)
        return None if stored is None else RecoverySettings.from_json(stored)

    def settle(self, settings: RecoverySettings) -> None:
        """Write the settings of the first recovery; check those of a later one.

        Raises:
            UserError: the study was recovered with other settings.
        """
        given, stored = settings.to_json(), _read(self._settings_file)
        if stored is None or not any(self.folder.glob(PATTERN)):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._settings_file, json.dumps(given, indent=1))
            return
        differences = differing(stored, given)
        if differences:
            study = self.folder.parent.name
            raise UserError(
                f"the settings of a recovery of study {study!r} must stay the same, so that its "
                f"results can be compared (got {described(differences)}); use the old settings, or "
                f"remove {self.folder} to start again",
                Code.MISMATCH, study=study, differences=differences,
            )  # fmt: skip

    def results(self) -> list[TrialResult]:
        return read_results(self.folder)

    def write(self, result: TrialResult) -> None:
        write_result(self.folder, result)
