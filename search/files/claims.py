"""A claim on a folder in object storage: the equivalent of a lock where `flock` does not exist.

The holder writes a small file and renews it. A claim that is not renewed belongs to a process that
died, and is taken over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Protocol

from vitpareto.search.errors import Code, UserError

#: seconds between two renewals, and seconds without one after which the holder is considered dead
RENEW_INTERVAL_S, EXPIRES_S = 5.0, 20.0
#: seconds between two looks at another's claim, and between writing a claim and reading it back
POLL_S = 1.0

log = logging.getLogger("vitpareto")


class Objects(Protocol):
    """The object storage that holds the claim's file."""

    def read(self, key: str) -> bytes | None:
        """The content; None if the object does not exist."""

    def write(self, key: str, content: bytes) -> None:
        """Replace the object."""

    def remove(self, key: str) -> None:
        """Delete the object if it exists."""


@contextlib.contextmanager
def claim(objects: Objects, key: str, study: str) -> Iterator[None]:
    """Hold the claim `key` on a study for the duration of the block.

    Raises UserError (`Code.BUSY`) if another process holds it and renews it.
    """
    driver = uuid.uuid4().hex
    _wait_until_free(objects, key, study)
    _write(objects, key, driver)
    time.sleep(POLL_S)  # of two processes that claim at the same time, the later writer wins
    current = objects.read(key)
    if current is None or json.loads(current)["driver"] != driver:
        raise _busy(study, current)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_INTERVAL_S):
            with contextlib.suppress(UserError):  # the storage may be unavailable for a while
                _write(objects, key, driver)

    renewing = threading.Thread(target=renew, daemon=True, name="claim")
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        objects.remove(key)


def _write(objects: Objects, key: str, driver: str) -> None:
    content = {"driver": driver, "host": os.uname().nodename, "at": time.time_ns()}
    objects.write(key, json.dumps(content).encode())


def _wait_until_free(objects: Objects, key: str, study: str) -> None:
    """Return when there is no claim, or when it has expired."""
    first = objects.read(key)
    if first is None:
        return
    log.warning("study %s has a claim: waiting %g s to see if it is renewed", study, EXPIRES_S)
    end = time.monotonic() + EXPIRES_S
    while time.monotonic() < end:
        time.sleep(POLL_S)
        now = objects.read(key)
        if now is None:
            return
        if now != first:
            raise _busy(study, now)


def _busy(study: str, claim: bytes | None) -> UserError:
    host = json.loads(claim)["host"] if claim else "another node"
    return UserError(
        f"study {study!r} is being searched by another process, on {host}: wait for it or stop it",
        Code.BUSY,
        study=study,
        host=host,
    )
