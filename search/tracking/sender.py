"""The thread that sends a tracker's entries to MLflow and retries if the server is unavailable."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.connection import connect
from vitpareto.search.tracking.live_updates import CURVE_INTERVAL_S, LiveUpdates
from vitpareto.search.tracking.notices import Event, Notice
from vitpareto.search.tracking.outbox import EndEntry, Outbox, outbox_path
from vitpareto.search.tracking.reconcile import reconcile
from vitpareto.search.tracking.server_address import error_text, shown_uri
from vitpareto.search.tracking.state import sender_lock, set_ended

#: seconds between attempts after a failure: doubled each time, up to the maximum
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 30.0
#: seconds after which the end of a search stops waiting for a server, and reports that it waits
FINISH_TIMEOUT_S, FINISH_NOTICE_S = 45.0, 5.0

log = logging.getLogger("vitpareto")


class Sender:
    """Sends the entries of an outbox in order. An entry is removed once the server has it."""

    def __init__(
        self, folder: StudyFolder, uri: str, outbox: Outbox, notify: Callable[[str], None]
    ) -> None:
        self.folder, self.uri, self.outbox, self.notify = folder, uri, outbox, notify
        self._state_lock = threading.Lock()  # of tracking.json and `_finishing`
        self._wake, self._finish_now, self._done = (threading.Event() for _ in range(3))
        self._thread: threading.Thread | None = None
        self._updates: LiveUpdates | None = None  # None: not connected
        self._finishing = self._given_up = self._unavailable = False
        self._failures = 0
        self._failed_attempt_began = 0.0

    # ------------------------------------------------------------------ called by the search

    @property
    def started(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Entries were added."""
        self._wake.set()

    def finish(self, end: EndEntry) -> bool:
        """Send everything and end the study's run. False if the server does not have it all.

        Waits at most FINISH_TIMEOUT_S, and stops earlier if an attempt fails.
        """
        with self._state_lock:
            self._finishing = True
            try:
                set_ended(self.folder, end.reason)
            except OSError as error:
                log.debug("cannot write tracking.json: %s", error)
        began, failures, was_unavailable = time.monotonic(), self._failures, self._unavailable
        self.outbox.add(end)
        self._wake.set()
        self.start()
        self._finish_now.set()
        noticed = False
        while not self._done.wait(0.02):
            waited = time.monotonic() - began
            # an attempt that began earlier may have failed before the server became available
            failed = self._failures > failures and (
                was_unavailable or self._failed_attempt_began >= began
            )
            if failed or waited > FINISH_TIMEOUT_S:
                self._give_up()
                return False
            if waited > FINISH_NOTICE_S and not noticed:
                noticed = True
                self._notify(Event.SENDING, f"sending the remaining entries to {self._server}")
        return True

    def _give_up(self) -> None:
        self._given_up = True
        self._wake.set()
        self._notify(
            Event.NOT_SENT,
            f"{len(self.outbox)} entries have not been sent to {self._server} yet; they are "
            f"stored in {outbox_path(self.folder)}. Run vitpareto sync {self.folder.name} to send "
            "them",
        )

    # ------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        with contextlib.ExitStack() as lock:
            locked = False
            while not self._given_up:
                began = time.monotonic()
                try:
                    if not locked:
                        lock.enter_context(sender_lock(self.folder))
                        locked = True
                    self._send()
                except Exception as error:
                    self._updates = None  # its knowledge of the server may be wrong now
                    self._report_failure(error)
                    self._failed_attempt_began = began
                    self._failures += 1
                    self._finish_now.wait(retry_s)
                    retry_s = min(2 * retry_s, MAX_RETRY_S)
                    continue
                retry_s = FIRST_RETRY_S
                if self._settle():
                    self._done.set()
                    return
                # points of the curve that were held back are sent at the next round
                self._wake.wait(CURVE_INTERVAL_S if self._has_unsent_points else None)
                self._wake.clear()

    @property
    def _has_unsent_points(self) -> bool:
        return self._updates is not None and bool(self._updates.unsent_points)

    def _send(self) -> None:
        """Send all entries."""
        if self._updates is None:
            self._updates = self._connected()
        if self._unavailable:
            self._unavailable = False
            self._notify(Event.AVAILABLE, f"{self._server} is available again")
        while self.outbox and not self._given_up:
            entry = self.outbox.first()
            if isinstance(entry, EndEntry):
                self._updates.unsent_points.clear()  # reconciling sends the whole curve
                report = reconcile(
                    self._updates.runs, self.folder, ended=entry.reason, page=entry.page
                )
                self._report_refused(report.refused)
            else:
                self._updates.send_result(entry, newest=len(self.outbox) == 1)
            self.outbox.remove_first()
        self._updates.send_curve()

    def _connected(self) -> LiveUpdates:
        """Connect, end runs that an earlier process left RUNNING, and send what it had not sent."""
        with self._state_lock:
            if not self._finishing:
                set_ended(self.folder, "")
        runs = connect(self.folder, self.uri)
        reconcile(runs, self.folder, running=True)
        return LiveUpdates(self.folder, runs)

    def _settle(self) -> bool:
        """Clear the outbox if everything is sent. True if the last entry was sent."""
        if self._has_unsent_points:
            return False
        # read first: an entry that is added meanwhile may be the last one
        closed = self.outbox.closed
        if not self.outbox.clear_if_sent():
            self._wake.set()
            return False
        return closed

    # -------------------------------------------------------------------------------- notices

    @property
    def _server(self) -> str:
        return f"MLflow at {shown_uri(self.uri)}"

    def _notify(self, event: Event, text: str) -> None:
        self.notify(Notice(event, text))

    def _report_failure(self, error: Exception) -> None:
        if not self._unavailable:
            self._notify(
                Event.UNAVAILABLE,
                f"{self._server} is unavailable ({error_text(error)}). The search continues, and "
                "results are stored in the outbox until it answers",
            )
        self._unavailable = True

    def _report_refused(self, refused: Mapping[int | None, str]) -> None:
        if refused:
            trial, reason = next(iter(refused.items()))
            run = "the study" if trial is None else f"trial {trial}"
            self._notify(
                Event.REFUSED, f"MLflow rejected {len(refused)} runs; {run}: {reason[:200]}"
            )
