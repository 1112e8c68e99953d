"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


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


def write_atomic(path: Path, text: str) -> None:
    """A text, as `replacing` writes."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
