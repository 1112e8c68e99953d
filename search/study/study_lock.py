"""The lock of a study: one driver at a time, on one machine or several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.locks import LockTimeout, is_locked, locked
from vitpareto.search.files.write_through import object_store_of

#: `is_held` holds the lock for an instant; a driver holds it as long as it runs.
TIMEOUT_S = 0.3


@dataclass(frozen=True)
class StudyLock:
    """The lock of the study in `folder`."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "lock"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock for the duration of the block.

        Raises:
            UserError: another driver holds it, or the file system does not support locks.
        """
        study = self.folder.name
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path, timeout_s=TIMEOUT_S))
            except LockTimeout:
                raise UserError(
                    f"study {study!r} is searched by another process: wait for it or stop it",
                    Code.BUSY, study=study,
                ) from None  # fmt: skip
            except OSError as error:
                raise UserError(
                    f"{self.path} cannot be locked: {error.strerror}",
                    Code.UNWRITABLE, path=str(self.path),
                ) from error  # fmt: skip
            store = object_store_of(self.folder)
            if store is not None:
                stack.enter_context(store.claim(self.folder))
            yield

    @property
    def is_held(self) -> bool:
        """Whether a driver holds the lock now."""
        return is_locked(self.path)
