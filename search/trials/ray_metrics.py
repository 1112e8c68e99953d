"""How a search stands, as numbers on Ray's metrics page, for Prometheus and Grafana.

A hook of the searcher. Where Ray has no metrics page (it needs `ray[default]`) the numbers go
nowhere, at no cost. Ray puts `ray_` before each name; `dashboards/grafana/` asks for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ray.util.metrics import Gauge

if TYPE_CHECKING:
    from vitpareto.search.study.progress import StudyProgress
    from vitpareto.search.study.results import TrialResult

#: seconds over which rates and shares are taken
WINDOW_S = 60.0
#: every number, and what it is
NUMBERS = {
    "vitpareto_trials": "trials of the study, by state",
    "vitpareto_front_size": "trials on the front",
    "vitpareto_hypervolume": "hypervolume of the front",
    "vitpareto_worker_busy_share": "share of the last minute that workers measured, 0 to 1",
    "vitpareto_images_per_second": "images measured a second, over the last minute",
    "vitpareto_outbox_depth": "results that MLflow is still owed",
}


class Metrics:
    """Keeps the gauges of one study up to date; `hear` is the searcher's hook.

    workers: how many measure at a time. owed: how many results MLflow is owed now.
    """

    def __init__(
        self,
        study: str,
        workers: int,
        owed: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study, self.workers, self.owed, self.clock = study, workers, owed, clock
        self.begin = clock()
        #: (when it ended, its seconds, its images), of the last minute
        self.recent: deque[tuple[float, float, int]] = deque()
        self.gauges = {
            name: Gauge(name, said, tag_keys=("study", *(["state"] if "trials" in name else ())))
            for name, said in NUMBERS.items()
        }

    def hear(self, result: TrialResult | None, tally: StudyProgress) -> None:
        """A result became durable, or a trial was handed out."""
        now = self.clock()
        if result is not None:
            self.recent.append((now, result.seconds, result.images))
        while self.recent and now - self.recent[0][0] > WINDOW_S:
            self.recent.popleft()
        for state, count in (
            ("finished", tally.finished),
            ("raced_out", tally.raced_out),
            ("failed", tally.failed),
            ("running", tally.running),
        ):
            self._set("vitpareto_trials", count, state=state)
        self._set("vitpareto_front_size", len(tally.front))
        self._set("vitpareto_hypervolume", tally.hypervolume)
        busy, images = self.rates(now)
        self._set("vitpareto_worker_busy_share", busy)
        self._set("vitpareto_images_per_second", images)
        self._set("vitpareto_outbox_depth", self.owed())

    def rates(self, now: float) -> tuple[float, float]:
        """(share of the workers' time that results of the last minute took, images a second)."""
        span = min(WINDOW_S, now - self.begin)
        if span <= 0:
            return 0.0, 0.0
        # of a trial that began before the window only what lies in it
        busy = sum(min(seconds, span - (now - end)) for end, seconds, _ in self.recent)
        return min(1.0, busy / (self.workers * span)), sum(n for *_, n in self.recent) / span

    def _set(self, name: str, value: float, **tags: str) -> None:
        self.gauges[name].set(float(value), {"study": self.study, **tags})
