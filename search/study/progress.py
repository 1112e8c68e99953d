"""The progress of a running study: counts, the front and its hypervolume.

It may not import optuna, read or write anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vitpareto.search.study.front import Front, reference_point
from vitpareto.search.study.objectives import Objective
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.rungs import SAME_CANDIDATE

#: Relative growth of the hypervolume above which the front counts as improved.
GROWTH = 1e-3


@dataclass
class StudyProgress:
    """How far a study is, for progress lines, metrics and dashboards.

    Attributes:
        requested: number of trials to measure; None without a limit.
        finished, raced_out, failed: trials with a durable result, by state.
        running: trials that workers measure now.
        duplicates: proposals of a candidate that is known already.
        outside: proposals outside the budget window.
        hypervolume: of the front, over accuracy and primary cost.
        front: trial numbers, cheapest first.
        images: images evaluated by all trials.
        trials_without_growth: trials since the hypervolume last grew.
        ended: why no further trial is proposed; "" while the study runs.
    """

    requested: int | None = 0
    finished: int = 0
    raced_out: int = 0
    failed: int = 0
    running: int = 0
    duplicates: int = 0
    outside: int = 0
    hypervolume: float = 0.0
    front: tuple[int, ...] = ()
    images: int = 0
    trials_without_growth: int = 0
    ended: str = ""

    @property
    def done(self) -> int:
        """Number of trials with a durable result."""
        return self.finished + self.raced_out + self.failed


#: Called with every durable result, or None if only counts changed, and the progress.
ProgressHook = Callable[[TrialResult | None, StudyProgress], None]


class ProgressTracker:
    """Updates a study's progress with durable results."""

    def __init__(self, objectives: Sequence[Objective], requested: int | None) -> None:
        self.objectives = tuple(objectives)
        self.progress = StudyProgress(requested=requested)
        #: None until the dense model, whose costs are the reference point, is measured
        self.front: Front | None = None
        self._before_reference: list[TrialResult] = []
        self._last_growth = 0.0

    def add(self, result: TrialResult) -> None:
        """Count a result and update the front."""
        progress = self.progress
        progress.images += 0 if result.reason.startswith(SAME_CANDIDATE) else result.images
        progress.trials_without_growth += 1
        if result.state == "raced_out":
            progress.raced_out += 1
        elif result.state == "failed":
            progress.failed += 1
            if result.is_reference:
                progress.ended = f"the dense model could not be measured: {result.reason}"
        else:
            progress.finished += 1
            self._update_front(result)

    def _update_front(self, result: TrialResult) -> None:
        if self.front is not None:
            self.front.add(result.trial, result.values)
        elif result.is_reference:
            self.front = Front(self.objectives, reference_point(result.values, self.objectives))
            for earlier in (*self._before_reference, result):
                self.front.add(earlier.trial, earlier.values)
        else:
            self._before_reference.append(result)
            return
        progress = self.progress
        progress.hypervolume = self.front.progress()
        if result.is_reference or progress.hypervolume > (1 + GROWTH) * self._last_growth:
            self._last_growth = progress.hypervolume
            progress.trials_without_growth = 0
        progress.front = tuple(m.trial for m in self.front.members())
