"""The parts of Ray Tune that trials rely on beyond its documented interface, in one place.

The scheduler reads the controller's live trials and their status, and early stopping decides in it:
no scheduler of Ray's takes several metrics. Checked with the range of Ray in pyproject.toml.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

#: seconds between two looks at the disk, and the free bytes below which it counts as full
LOOK_S, FULL_BYTES = 2.0, 2**16

log = logging.getLogger("vitpareto")


class RungDecisions(Protocol):
    """What the scheduler asks the searcher."""

    #: propose nothing the next time Ray asks
    skip_next: bool

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial goes on to its next rung."""


class RungScheduler(FIFOScheduler):
    """Trials in order; at every rung the searcher decides whether a trial goes on.

    Ray gives a free worker to the first pending trial, and ends the process that is being started
    for that trial. If trials are shorter than a process takes to start, one worker does all the
    work. So until all workers run, a free worker gets the newest trial, for which no process is
    being started yet.
    """

    def __init__(self, searcher: RungDecisions, workers: int) -> None:
        super().__init__()
        self.searcher, self.workers = searcher, workers
        self.all_workers_run = False
        #: pending trials for which a process is being started
        self.starting: set[str] = set()

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        # live trials only: a look at all of them takes longer with every trial
        pending = [t for t in tune_controller.get_live_trials() if t.status == Trial.PENDING]
        pending.sort(key=lambda trial: trial.config["trial"])
        new = [t for t in pending if t.trial_id not in self.starting]
        self.starting = {t.trial_id for t in pending}
        candidates = pending if self.all_workers_run else new or pending
        return candidates[0] if candidates else None

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        live = tune_controller.get_live_trials()
        running = sum(t.status == Trial.RUNNING for t in live)
        self.all_workers_run = running >= self.workers
        # the free worker gets its trial first; the next proposal may then take its time
        pending = any(t.status == Trial.PENDING for t in live)
        self.searcher.skip_next = self.all_workers_run and pending

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        goes_on = self.searcher.goes_on(trial.trial_id, result)
        return FIFOScheduler.CONTINUE if goes_on else FIFOScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray pickles it and never reads it; hooks hold threads


class DiskWatch(tune.Callback):
    """Warns when the study's disk is full: workers then keep their results and wait silently."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.full, self.next_look = folder, False, 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + LOOK_S
        disk = os.statvfs(self.folder)
        full = disk.f_bavail * disk.f_frsize < FULL_BYTES
        if full and not self.full:
            log.warning("the disk of %s is full; the study waits until there is space", self.folder)
        elif self.full and not full:
            log.warning("the disk of %s has space again; the study continues", self.folder)
        self.full = full


class DropReport(tune.Callback):
    """Removes one key from each report that Ray would otherwise hold for the trial's lifetime."""

    def __init__(self, key: str) -> None:
        self.key = key

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        result.pop(self.key, None)
