"""Files that are whole or not there, whatever happens while they are written.

A full disk is waited for: whoever has something to keep holds it until there is room again, so that
a search pauses instead of losing what it measured.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

#: what a full disk, or a used-up quota, answers
FULL = (errno.ENOSPC, errno.EDQUOT)
#: seconds between two attempts
AGAIN = 1.0

log = logging.getLogger("vitpareto")
T = TypeVar("T")


def wait_for_room(place: Path, write: Callable[[], T]) -> T:
    """What `write` gives; while the disk of `place` is full it is called again and again, which is
    said once. Everything else that it raises is raised.
    """
    waited = False
    while True:
        try:
            written = write()
        except OSError as error:
            if error.errno not in FULL:
                raise
            if not waited:
                log.warning("%s; paused until there is room for %s", error.strerror, place)
            waited = True
            time.sleep(AGAIN)
        else:
            if waited:
                log.warning("there is room for %s again; going on", place)
            return written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under. When the block ends, what lies there is flushed to the
    disk and renamed over `path`: old or new, never half. If it raises, nothing is left of it.
    """
    # not tempfile: its files are for their owner alone, and a study is read by others
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    # the rename itself is on the disk only once its folder is
    _flush(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """A text in UTF-8, or bytes, as `replacing` writes; a full disk is waited for."""
    data = content.encode() if isinstance(content, str) else content

    def write() -> None:
        with replacing(path) as partial:
            partial.write_bytes(data)

    wait_for_room(path, write)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
