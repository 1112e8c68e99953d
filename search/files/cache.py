"""The cache folder of this user, and a lock between processes that fill it."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


def default_cache() -> Path:
    """VITPARETO_CACHE, or the platform's cache folder for this program; `XDG_CACHE_HOME` is
    respected everywhere.
    """
    if os.environ.get("VITPARETO_CACHE"):
        return Path(os.environ["VITPARETO_CACHE"]).expanduser().absolute()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "vitpareto"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vitpareto"
    return Path.home() / ".cache" / "vitpareto"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its holder, however that ends."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process decodes these images: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
