"""Locks between processes. The kernel releases a lock when its holder exits, however it exits.

All locks are `flock` locks on a file that stays in place: processes that run an older version of
this project exclude each other on the same files.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from filelock import Timeout as LockTimeout

__all__ = ["LockTimeout", "is_locked", "locked"]

log = logging.getLogger(__name__)


@contextmanager
def locked(
    path: Path, *, timeout_s: float | None = None, waiting: str | None = None
) -> Iterator[None]:
    """Hold the lock on `path` for the duration of the block; the file is created if missing.

    Args:
        path: the lock file. Its folder must exist.
        timeout_s: how long to wait for another holder; None waits without limit.
        waiting: message to log once, at level INFO, if another process holds the lock.

    Raises:
        LockTimeout: another process holds the lock after `timeout_s` (an OSError).
        OSError: the file cannot be opened, or its file system does not support locks.
    """
    if not path.parent.is_dir():  # filelock would create it: a deleted study must stay deleted
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    # a lock without the kernel's support would survive a killed holder: fail instead
    lock = FileLock(path, thread_local=False, fallback_to_soft=False, preserve_lock_file=True)
    try:
        lock.acquire(timeout=0)
    except LockTimeout:
        if waiting is not None:
            log.info(waiting)
        lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
    try:
        yield
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on `path`. False if the file does not exist.

    Works on a read-only file system, where filelock cannot open the file: a shared lock is taken
    for an instant. A process that acquires the lock at that instant must retry.
    """
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
