"""Prepare once: training that serves many trials, cached by a hash of all that it depends on.

What is prepared lies beside the studies, so that they share it:

STORE/.prepared/KEY/what.json      all that the hash is over
STORE/.prepared/KEY/done.json      what came of it; while it is not there, nothing has come of it
STORE/.prepared/KEY/weights/       the trained weights, by digest
STORE/.prepared/KEY/progress/      what a killed preparation resumes from; gone once it is done
STORE/.prepared/KEY/lock           held (flock) by the one process that trains

Who else asks for the same thing meanwhile waits for it. Nothing here knows Ray or a study.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpareto import methods
from vitpareto.search.files.atomic import delete_tree, write_atomic
from vitpareto.search.files.locks import locked
from vitpareto.search.files.write_through import fetch_if_missing
from vitpareto.search.models.weight_store import Artifacts

#: Raised when what a preparation computes changes, so that none of before is taken for it.
SCHEMA = 1


def needs(method: str) -> str | None:
    """The job key that gives a method epochs of training; None where it needs none."""
    if methods.get(method).training != "required":
        return None
    return "prepare_epochs" if methods.get(method).trained_once else "train_epochs"


@dataclass(frozen=True)
class Preparation:
    """One that is done. `outcome`: what came of it, in JSON's types; `fresh`: it was made now, not
    found; `seconds`: that its making took, after the last time it was interrupted.
    """

    method: str
    key: str
    folder: Path
    outcome: dict[str, Any]
    seconds: float
    fresh: bool

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.folder / "weights")

    def plain(self) -> dict[str, Any]:
        """For a study's record of what its trials share."""
        return {
            "method": self.method, "key": self.key, "seconds": self.seconds, "fresh": self.fresh,
        }  # fmt: skip


def key_of(what: Mapping[str, Any]) -> str:
    """16 hex digits of all that a preparation depends on (JSON's types)."""
    text = json.dumps({"schema": SCHEMA, **what}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_once(
    store: Path,
    method: str,
    what: Mapping[str, Any],
    train: Callable[[Path, Artifacts], dict[str, Any]],
) -> Preparation:
    """What `train` made of `what`: found where it was made before, otherwise made here.

    store: the folder of studies. train(progress, artifacts): gives the outcome, keeps weights in
    `artifacts`, and in the folder `progress` whatever it resumes from. It raises what it raises;
    what it kept stays for the next time.
    """
    what = {"method": method, **what}
    key = key_of(what)
    folder = store / ".prepared" / key
    found = _done(folder, method, key)
    if found is not None:
        return found
    progress = folder / "progress"
    progress.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        found = _done(folder, method, key)  # another process made it while this one waited
        if found is not None:
            return found
        begin = time.monotonic()
        write_atomic(folder / "what.json", json.dumps({"schema": SCHEMA, **what}, indent=1))
        outcome = train(progress, Artifacts(folder / "weights"))
        seconds = round(time.monotonic() - begin, 3)
        done = {"outcome": outcome, "seconds": seconds}
        write_atomic(folder / "done.json", json.dumps(done, indent=1))
        delete_tree(progress)
    made = _done(folder, method, key)
    assert made is not None
    return Preparation(method, key, folder, made.outcome, seconds, fresh=True)


def _done(folder: Path, method: str, key: str) -> Preparation | None:
    fetch_if_missing(folder / "done.json")
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Preparation(method, key, folder, done["outcome"], done["seconds"], fresh=False)
