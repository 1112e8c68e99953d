"""What made a result: software, model, data, device, and how the candidate got its weights.

Data only: it may not measure, read or write anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vitpareto.search.training.preparation_cache import PreparationUse
from vitpareto.search.training.training_record import RecoveryRecord, TrainingRecord


def _uses(stored: Iterable[Mapping[str, Any]]) -> tuple[PreparationUse, ...]:
    return tuple(PreparationUse.from_json(use) for use in stored)


#: how the values that are records are read from a file, by key
_RECORDS: dict[str, Callable[[Any], object]] = {
    "prepared": _uses,
    "training": TrainingRecord.from_json,
    "recovery": RecoveryRecord.from_json,
}


@dataclass(frozen=True)
class Provenance:
    """What made a result. A value that does not apply is None and is not written.

    The order of the attributes is the order of the keys in a result file.

    Attributes:
        versions: of Python and packages, by name.
        model: name or path of the dense model.
        classes: number of classes of the data.
        model_fingerprint: of the dense model's weights.
        data: name or path of the dataset.
        data_fingerprint: of the images.
        seed: of the study.
        device: name of the device that measured.
        dtype: of the forward passes.
        batch: images per forward pass.
        prepared: the preparations that the candidate's weights come from; () if its method shares
            none.
        training: the candidate's own training, if its method requires one per trial.
        recovery: the fine-tuning after the search, of a recovered trial.
        split: that was measured, if it is not the search split.
        traceback: of the error that ended the trial.
        extra: JSON values under keys that this version does not know; written last.
    """

    versions: Mapping[str, str] | None = None
    model: str | None = None
    classes: int | None = None
    model_fingerprint: str | None = None
    data: str | None = None
    data_fingerprint: str | None = None
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    batch: int | None = None
    prepared: tuple[PreparationUse, ...] | None = None
    training: TrainingRecord | None = None
    recovery: RecoveryRecord | None = None
    split: str | None = None
    traceback: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Provenance:
        """Return the provenance of a file's JSON; unknown keys go to `extra`."""
        names = {f.name for f in fields(cls)} - {"extra"}
        known = {k: v for k, v in stored.items() if k in names}
        for name, read in _RECORDS.items():
            if known.get(name) is not None:
                known[name] = read(known[name])
        return cls(**known, extra={k: v for k, v in stored.items() if k not in names})

    def to_json(self) -> dict[str, Any]:
        """Return the values that apply, for a file."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        written = {name: value for name, value in known.items() if value is not None}
        if self.prepared is not None:
            written["prepared"] = [use.to_json() for use in self.prepared]
        if self.training is not None:
            written["training"] = self.training.to_json()
        if self.recovery is not None:
            written["recovery"] = self.recovery.to_json()
        return {**written, **self.extra}

    def updated(self, other: Provenance) -> Provenance:
        """Return this provenance with the values that `other` has."""
        known = {f.name: getattr(other, f.name) for f in fields(other) if f.name != "extra"}
        given = {name: value for name, value in known.items() if value is not None}
        return replace(self, **given, extra={**self.extra, **other.extra})
