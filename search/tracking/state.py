"""What tracking stores next to a study: its id on servers, why its search ended, and a lock.

STORE/NAME/tracking.json   `TrackingState`
STORE/NAME/tracking.lock   held by the one process that sends to MLflow
"""

from __future__ import annotations

import contextlib
import json
import uuid
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.locks import locked
from vitpareto.search.study.folder import StudyFolder


@dataclass(frozen=True)
class TrackingState:
    """A study as far as tracking is concerned.

    Attributes:
        id: identifies the study's runs on every server. Created once.
        ended: why the last tracked search ended. Empty while it runs, or if it was interrupted.
        trials: how many results were on disk when it ended. If there are more now, `ended` no
            longer holds.
    """

    id: str
    ended: str = ""
    trials: int = 0

    @classmethod
    def read(cls, folder: StudyFolder) -> TrackingState:
        """The stored state. A new one is stored if there is none or if it cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            stored = json.loads((folder.folder / "tracking.json").read_text(encoding="utf-8"))
            if stored["id"]:
                return cls(**stored)
        created = cls(uuid.uuid4().hex)
        created.write(folder)
        return created

    def write(self, folder: StudyFolder) -> None:
        write_atomic(folder.folder / "tracking.json", json.dumps(asdict(self)))


def set_ended(folder: StudyFolder, reason: str) -> None:
    """Store why the search ended; an empty reason for a search that runs or was interrupted."""
    stored = TrackingState.read(folder)
    state = replace(stored, ended=reason, trials=folder.trials.count() if reason else 0)
    if state != stored:
        state.write(folder)


def sender_lock(folder: StudyFolder, timeout_s: float = 0.0) -> AbstractContextManager[None]:
    """Held by the process that sends the study to MLflow; LockTimeout if another one holds it."""
    return locked(folder.folder / "tracking.lock", timeout_s=timeout_s)
