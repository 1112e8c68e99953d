"""Entries that have not been sent to MLflow yet: a queue in memory and a file.

STORE/NAME/outbox.jsonl has one line per entry, with the server it is for (`to`). The content of an
entry is always read from the study; the file only shows that something is missing on a server. It
needs no fsync: what a power failure removes, the next search or `sync` finds in the study.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.page import StudyPage

log = logging.getLogger("vitpareto")


@dataclass(frozen=True)
class ResultEntry:
    """A trial's result became durable, with the state of the study at that moment.

    Attributes:
        trial: number of the trial.
        front: trials on the front.
        hypervolume: hypervolume of the front.
        step: how many results the study had.
    """

    trial: int
    front: tuple[int, ...]
    hypervolume: float
    step: int

    def line(self) -> dict[str, Any]:
        """The entry's line in the file, without the server."""
        return {"trial": self.trial, "step": self.step}


@dataclass(frozen=True)
class EndEntry:
    """The search ended; `reason` is empty if it was interrupted."""

    reason: str
    page: StudyPage | None

    def line(self) -> dict[str, Any]:
        """The entry's line in the file, without the server."""
        return {"ended": self.reason}


Entry = ResultEntry | EndEntry


def outbox_path(folder: StudyFolder) -> Path:
    return folder.folder / "outbox.jsonl"


def clear_outbox(folder: StudyFolder, server: str) -> None:
    """Remove the lines of a server that has everything. `server` is an address as shown."""
    with (
        contextlib.suppress(FileNotFoundError),
        open(outbox_path(folder), "r+", encoding="utf-8") as file,
    ):
        others = [line for line in file if f'"to": {json.dumps(server)}' not in line]
        file.seek(0)
        file.truncate()
        file.writelines(others)


class Outbox:
    """The queue of one tracker. One thread adds entries, another one sends and removes them."""

    def __init__(self, folder: StudyFolder, server: str) -> None:
        """`server`: the address as shown, without a password."""
        self._folder, self._server = folder, server
        self._entries: deque[Entry] = deque()
        self._lock = threading.Lock()  # of the file and of `_closed`, held for microseconds
        self._file: int | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def closed(self) -> bool:
        """Whether the last entry was added."""
        return self._closed

    def add(self, entry: Entry) -> None:
        """Append an entry; an `EndEntry` is the last one."""
        with self._lock:
            try:
                if self._file is None:
                    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                    self._file = os.open(outbox_path(self._folder), flags, 0o666)
                line = {"to": self._server, **entry.line()}
                os.write(self._file, json.dumps(line).encode() + b"\n")
            except OSError as error:  # writing the study itself reports a problem with the disk
                log.debug("cannot write the outbox: %s", error)
            self._entries.append(entry)
            self._closed = isinstance(entry, EndEntry)

    def first(self) -> Entry:
        """The oldest entry, which stays in the queue until `remove_first`."""
        return self._entries[0]

    def remove_first(self) -> None:
        """The oldest entry is on the server."""
        self._entries.popleft()

    def clear_if_sent(self) -> bool:
        """Remove this server's lines from the file. False if an entry was added meanwhile."""
        with self._lock:
            if self._entries:
                return False
            if self._file is not None:
                clear_outbox(self._folder, self._server)
                if self._closed:
                    os.close(self._file)
                    self._file = None
            return True
