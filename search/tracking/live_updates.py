"""Sends the results of a running search to a server, one at a time."""

from __future__ import annotations

import time

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.outbox import ResultEntry
from vitpareto.search.tracking.run_contents import (
    CurvePoint,
    FrontPosition,
    ranks_of,
    trial_run,
)
from vitpareto.search.tracking.study_runs import StudyRuns

#: minimum seconds between two updates of the hypervolume curve, which save a request per trial
CURVE_INTERVAL_S = 2.0


class LiveUpdates:
    """The state of one connection: which runs and which points of the curve the server has.

    `runs` must have been reconciled with the study.
    """

    def __init__(self, folder: StudyFolder, runs: StudyRuns) -> None:
        self.folder, self.runs = folder, runs
        self.unsent_points: list[CurvePoint] = []
        self._steps = runs.curve_steps()
        self._curve_sent_s = 0.0

    def send_result(self, entry: ResultEntry, *, newest: bool) -> None:
        """Create the run of a trial, unless it exists.

        newest: whether no later entry is pending. Only then the front is updated.
        """
        result = self.folder.trials.get(entry.trial)
        if result is None:
            return  # the file was deleted: the trial is no longer part of the study
        if entry.trial not in self.runs.runs:  # else reconciling has created it
            on_front = entry.trial in entry.front
            position = FrontPosition(on_front, 0 if on_front else None)
            self.runs.put(trial_run(result, study=self.folder.name, position=position))
        if entry.step not in self._steps:
            self._steps.add(entry.step)
            self.unsent_points.append(CurvePoint(entry.step, entry.hypervolume, result.ended_ms))
        if newest:
            self._update_front(set(entry.front))

    def _update_front(self, front: set[int]) -> None:
        """Update the runs of trials that entered or left the front."""
        stored = self.runs.on_front()
        left = stored - front
        if left:
            ranks = ranks_of(self.folder.trials.all(), self.folder.objectives)
            for trial in sorted(left):
                # `ranks` may be newer than `front`, but what left the front cannot return
                rank = max(1, ranks.get(trial, 1))
                self.runs.set_on_front(trial, on_front=False, rank=rank)
        for trial in sorted(front - stored):
            self.runs.set_on_front(trial, on_front=True, rank=0)

    def send_curve(self) -> None:
        """Send the unsent points of the curve, unless some were sent a moment ago."""
        if self.unsent_points and time.monotonic() - self._curve_sent_s >= CURVE_INTERVAL_S:
            self.runs.log_curve(self.unsent_points)
            self.unsent_points.clear()
            self._curve_sent_s = time.monotonic()
