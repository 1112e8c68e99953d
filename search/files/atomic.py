"""Files that are whole or not there, whatever happens while they are written.

A full disk is waited for: whoever has something to keep holds it until there is room again, so that
a search pauses instead of losing what it measured.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

#: what a full disk, or a used-up quota, answers
FULL = (errno.ENOSPC, errno.EDQUOT)
#: seconds between two attempts
AGAIN = 1.0

log = logging.getLogger("vitpareto")
T = TypeVar("T")


class Elsewhere(Protocol):
    """Where the files of a folder are kept too (`search.files.object_store`)."""

    def put(self, path: Path) -> None:
        """Keep the file there, as it is now."""

    def get(self, path: Path) -> bool:
        """Bring the file from there; False where it is not."""

    def names(self, folder: Path) -> Iterable[str]:
        """What is there in a folder."""

    def drop(self, folder: Path) -> None:
        """Forget a file, or a folder and all below it."""

    def claimed(self, folder: Path) -> AbstractContextManager[None]:
        """The folder is this process's alone, of all machines'."""


_kept: dict[Path, Elsewhere] = {}
_writes = True


def only_read() -> None:
    """Nothing becomes durable by this process any more: another one does the same and writes."""
    global _writes
    _writes = False


def discard(path: Path) -> None:
    """Remove a file that nobody needs any more, here and elsewhere."""
    if not _writes:
        return
    path.unlink(missing_ok=True)
    place = elsewhere(path)
    if place is not None:
        place.drop(path)


def keep_elsewhere(root: Path, place: Elsewhere) -> None:
    """Everything that becomes durable below `root` is kept there too, from now on."""
    _kept[root] = place


def elsewhere(path: Path) -> Elsewhere | None:
    """Where this file is kept too; None where it is here alone."""
    if _kept:
        for root in (path, *path.parents):
            if root in _kept:
                return _kept[root]
    return None


def there(path: Path) -> bool:
    """Whether a file that never changes is there; it is brought where it is kept elsewhere."""
    if path.is_file():
        return True
    place = elsewhere(path)
    return place is not None and place.get(path)


def latest(path: Path) -> bool:
    """Whether a file that others may have changed is there, as it is now."""
    place = elsewhere(path)
    return path.is_file() if place is None else place.get(path) or path.is_file()


def found_in(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder, in order of their names; what is kept elsewhere is brought."""
    place = elsewhere(folder)
    if place is not None:
        for name in place.names(folder):
            if fnmatch.fnmatch(name, pattern) and "/" not in name:
                there(folder / name)
    return sorted(folder.glob(pattern))


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


def forget(folder: Path) -> None:
    """Remove a folder and all below it, here and elsewhere; nothing where it is not there."""
    if not _writes:
        return
    shutil.rmtree(folder, ignore_errors=True)
    place = elsewhere(folder)
    if place is not None:
        place.drop(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under. When the block ends, what lies there is flushed to the
    disk and renamed over `path`: old or new, never half. If it raises, nothing is left of it.
    """
    if not _writes:
        with tempfile.TemporaryDirectory(prefix="vitpareto-unwritten-") as nowhere:
            yield Path(nowhere) / path.name
        return
    place = elsewhere(path)
    if place is not None:  # a node that has nothing of the folder yet
        path.parent.mkdir(parents=True, exist_ok=True)
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
    if place is not None:
        place.put(path)


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
