"""Atomic writes and deletions: a file is complete or absent, whatever interrupts the write.

Files below a folder that is registered in `search.files.write_through` are written to its object
store too. While the disk is full, a write waits instead of failing, so that a search pauses and
loses no measurement.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vitpareto.search.files.write_through import object_store_of

#: errors of a full disk and of a used-up quota
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
#: seconds between two attempts
RETRY_INTERVAL_S = 1.0

log = logging.getLogger("vitpareto")
T = TypeVar("T")

_writes = True


def disable_writes() -> None:
    """Make every write and deletion of this process a no-op: another process does the same work
    and writes the files (data-parallel training).
    """
    global _writes
    _writes = False


def delete_file(path: Path) -> None:
    """Delete a file, locally and in its object store. A missing file is ignored."""
    if not _writes:
        return
    path.unlink(missing_ok=True)
    store = object_store_of(path)
    if store is not None:
        store.delete(path)


def delete_tree(folder: Path) -> None:
    """Delete a folder and everything below it, locally and in its object store. A missing folder
    is ignored.
    """
    if not _writes:
        return
    shutil.rmtree(folder, ignore_errors=True)
    store = object_store_of(folder)
    if store is not None:
        store.delete(folder)


def retry_while_disk_full(path: Path, write: Callable[[], T]) -> T:
    """The result of `write()`, called again every second while the disk that holds `path` is full.

    The pause is logged once. Every other exception is raised.
    """
    waited = False
    while True:
        try:
            result = write()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            if not waited:
                log.warning("%s: paused until %s can be written", error.strerror, path)
            waited = True
            time.sleep(RETRY_INTERVAL_S)
        else:
            if waited:
                log.warning("%s was written: continuing", path)
            return result


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace `path` atomically: the block writes to the temporary path that it is given.

    When the block ends, the temporary file is flushed to the disk and renamed to `path`: a reader
    sees the old file or the new one. If the block raises, the temporary file is deleted.
    """
    if not _writes:
        with tempfile.TemporaryDirectory(prefix="vitpareto-unwritten-") as scratch:
            yield Path(scratch) / path.name
        return
    store = object_store_of(path)
    if store is not None:  # this node may have no local copy of the folder yet
        path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile, which creates files with mode 0600: other users read a study
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    # the rename is durable only once the folder is flushed
    _flush(path.parent)
    if store is not None:
        store.upload(path)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes atomically; waits while the disk is full."""
    data = content.encode() if isinstance(content, str) else content

    def write() -> None:
        with replacing(path) as partial:
            partial.write_bytes(data)

    retry_while_disk_full(path, write)


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
