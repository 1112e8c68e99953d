"""Keeps MLflow up to date while a search runs, without stopping, slowing or failing the search."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking.outbox import EndEntry, Outbox, ResultEntry
from vitpareto.search.tracking.page import StudyPage
from vitpareto.search.tracking.sender import Sender
from vitpareto.search.tracking.server_address import shown_uri, tracking_uri

if TYPE_CHECKING:
    from vitpareto.search.study.progress import StudyProgress

log = logging.getLogger("vitpareto")


class Tracker:
    """Sends every result to MLflow from a thread of its own.

        with Tracker(folder, uri) as tracker:
            run_study(job, ..., hooks=[tracker.on_result])
            tracker.finish(page, ended=progress.ended)

    Leaving the block without `finish` ends the study's run as KILLED.

    Args:
        folder: the study.
        uri: as for `tracking_uri`.
        notify: called with a `Notice` (a str) if the server stops answering, answers again, rejects
            runs, or does not have everything at the end. Called from two threads.

    Raises:
        UserError: the address is not valid.
    """

    def __init__(
        self,
        folder: StudyFolder,
        uri: str | None = None,
        *,
        notify: Callable[[str], None] = log.warning,
    ) -> None:
        server = tracking_uri(folder, uri)
        self._outbox = Outbox(folder, shown_uri(server))
        self._sender = Sender(folder, server, self._outbox, notify)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """How many entries the server does not have yet."""
        return len(self._outbox)

    def on_result(self, result: TrialResult | None, progress: StudyProgress) -> None:
        """Hook of the searcher; takes microseconds.

        Args:
            result: a result that has just become durable, or None if a trial was started.
            progress: the state of the study.
        """
        self._sender.start()
        if result is None:
            return
        self._outbox.add(
            ResultEntry(
                result.trial,
                progress.front,
                progress.hypervolume,
                step=progress.done,
            )
        )
        self._sender.wake()

    def finish(self, page: StudyPage | None = None, *, ended: str = "") -> bool:
        """Send what is left, with the artifacts of the study.

        Args:
            page: artifacts and table of the study's run.
            ended: why the search ended; empty if it was interrupted, which ends the run as KILLED.

        Returns:
            Whether the server has everything. Waits at most 45 s, and about 12 s for a server that
            does not answer.
        """
        assert not self._outbox.closed, "a tracker finishes once"
        return self._sender.finish(EndEntry(ended, page or StudyPage()))

    def close(self) -> None:
        """End the study's run as KILLED, unless `finish` was called or nothing was sent."""
        if not self._outbox.closed and self._sender.started:
            self._sender.finish(EndEntry("", None))
