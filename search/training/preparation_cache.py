"""Cache of preparations: a training that serves many trials is done once and found again by a hash.

Preparations are stored next to the studies, which share them:

STORE/.prepared/KEY/what.json      everything that the hash covers
STORE/.prepared/KEY/done.json      the outcome; a preparation without this file is not finished
STORE/.prepared/KEY/weights/       the trained weights, by digest
STORE/.prepared/KEY/progress/      what an interrupted preparation resumes from; removed at the end
STORE/.prepared/KEY/lock           locked by the process that trains

While a process trains a preparation, others that need it wait. This module knows neither Ray nor
studies.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitpareto import methods
from vitpareto.methods import BadInput
from vitpareto.methods.engine.preparation import PreparationOutcome, not_prepared
from vitpareto.search.files.atomic import delete_tree, write_atomic
from vitpareto.search.files.locks import locked
from vitpareto.search.files.write_through import fetch_if_missing
from vitpareto.search.models.weight_store import WeightStore

#: Part of the key. Raise it when a preparation of the same inputs computes something else.
SCHEMA = 1


def epochs_key(method: str) -> str | None:
    """The job key that gives a method its epochs of training; None if it needs no training."""
    declared = methods.get(method)
    if declared.training != "required":
        return None
    return "prepare_epochs" if declared.needs_preparation else "train_epochs"


@dataclass(frozen=True)
class UnknownOutcome(PreparationOutcome):
    """The outcome of a method that is not registered: it can be stored again, but not used.

    stored: its JSON values.
    """

    method: str
    stored: Mapping[str, Any]

    @property
    def digests(self) -> tuple[str, ...]:
        return ()

    def weights_for(self, params: Mapping[str, Any]) -> str:
        """Raises BadInput."""
        raise not_prepared(self.method)

    def to_json(self) -> dict[str, Any]:
        return dict(self.stored)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UnknownOutcome:
        return cls("", data)


def _outcome(method: str, stored: Mapping[str, Any]) -> PreparationOutcome:
    """The outcome of a file's JSON."""
    try:
        declared = methods.get(method)
    except BadInput:  # recorded by a version with other methods
        return UnknownOutcome(method, stored)
    return declared.preparation_outcome(stored)


@dataclass(frozen=True)
class PreparationRecord:
    """What a study stores about a preparation (an entry of prepared.json).

    Attributes:
        key: the preparation's key in the cache.
        seconds: how long it trained, without interruptions before the last start.
        fresh: whether it was trained for this study, not found in the cache.
        outcome: what it produced.
    """

    method: str
    key: str
    seconds: float
    fresh: bool
    outcome: PreparationOutcome

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method, "key": self.key, "seconds": self.seconds, "fresh": self.fresh,
            "outcome": self.outcome.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreparationRecord:
        outcome = _outcome(data["method"], data["outcome"])
        return cls(data["method"], data["key"], data["seconds"], data["fresh"], outcome)


@dataclass(frozen=True)
class PreparationUse:
    """A trial's use of a preparation, for the result's provenance.

    Attributes:
        on: the structural step that it was prepared on, "" for the dense model itself; None where
            the preparation is a structural step.
        seconds: None where only the study's record knows it.
    """

    method: str
    key: str
    fresh: bool
    seconds: float | None = None
    on: str | None = None

    def to_json(self) -> dict[str, Any]:
        given = {
            "method": self.method, "key": self.key, "seconds": self.seconds, "fresh": self.fresh,
            "on": self.on,
        }  # fmt: skip
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreparationUse:
        return cls(data["method"], data["key"], data["fresh"], data.get("seconds"), data.get("on"))


@dataclass(frozen=True)
class CachedPreparation:
    """A finished preparation in the cache: its folder, and its record for a study."""

    folder: Path
    record: PreparationRecord

    @property
    def key(self) -> str:
        return self.record.key

    @property
    def fresh(self) -> bool:
        """Whether it was trained by this call, not found."""
        return self.record.fresh

    @property
    def outcome(self) -> PreparationOutcome:
        return self.record.outcome

    @property
    def artifacts(self) -> WeightStore:
        """The trained weights."""
        return WeightStore(self.folder / "weights")


def key_of(inputs: Mapping[str, Any]) -> str:
    """16 hex digits of everything that a preparation depends on (JSON values)."""
    text = json.dumps({"schema": SCHEMA, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_once(
    store: Path,
    method: str,
    inputs: Mapping[str, Any],
    train: Callable[[Path, WeightStore], PreparationOutcome],
) -> CachedPreparation:
    """Find a preparation in the cache, or train it.

    Args:
        store: the folder of studies.
        inputs: everything that the preparation depends on, as JSON values.
        train: called with the folder for progress and the store for weights. Whatever it raises is
            raised; the progress stays for the next call.
    """
    inputs = {"method": method, **inputs}
    key = key_of(inputs)
    folder = store / ".prepared" / key
    found = _finished(folder, method, key)
    if found is not None:
        return found
    progress = folder / "progress"
    progress.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", waiting=f"waiting for another process that prepares {method}"):
        found = _finished(folder, method, key)  # trained by another process meanwhile
        if found is not None:
            return found
        begin = time.monotonic()
        write_atomic(folder / "what.json", json.dumps({"schema": SCHEMA, **inputs}, indent=1))
        outcome = train(progress, WeightStore(folder / "weights"))
        seconds = round(time.monotonic() - begin, 3)
        done = {"outcome": outcome.to_json(), "seconds": seconds}
        write_atomic(folder / "done.json", json.dumps(done, indent=1))
        delete_tree(progress)
    stored = _finished(folder, method, key)
    assert stored is not None
    return replace(stored, record=replace(stored.record, fresh=True))


def _finished(folder: Path, method: str, key: str) -> CachedPreparation | None:
    fetch_if_missing(folder / "done.json")
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    record = PreparationRecord(
        method, key, done["seconds"], False, _outcome(method, done["outcome"])
    )
    return CachedPreparation(folder, record)
