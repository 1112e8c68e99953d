"""A search's progress as gauges on Ray's metrics page, for Prometheus and Grafana.

A hook of the searcher. Without a metrics page (it needs `ray[default]`) the gauges have no effect.
Ray prefixes each name with `ray_`; `dashboards/grafana/` queries them.
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

#: seconds over which rates and shares are averaged
WINDOW_S = 60.0
#: the gauges and their descriptions
GAUGES = {
    "vitpareto_trials": "trials of the study, by state",
    "vitpareto_front_size": "trials on the front",
    "vitpareto_hypervolume": "hypervolume of the front",
    "vitpareto_worker_busy_share": "share of the last minute that workers measured, 0 to 1",
    "vitpareto_images_per_second": "images measured per second, over the last minute",
    "vitpareto_outbox_depth": "results that have not been sent to MLflow yet",
}

#: tags of a gauge; the others have the study only
TAGS = {"vitpareto_trials": ("study", "state")}


class Metrics:
    """The gauges of one study; `on_result` is the searcher's hook.

    workers: trials at a time. unsent: returns how many results have not been sent to MLflow yet.
    """

    def __init__(
        self,
        study: str,
        workers: int,
        unsent: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.study, self.workers, self.unsent, self.clock = study, workers, unsent, clock
        self.start = clock()
        #: (end, seconds, images) of the results of the last minute
        self.recent: deque[tuple[float, float, int]] = deque()
        self.gauges = {
            name: Gauge(name, description, tag_keys=TAGS.get(name, ("study",)))
            for name, description in GAUGES.items()
        }

    def on_result(self, result: TrialResult | None, progress: StudyProgress) -> None:
        """Update the gauges after a result, or after a trial was started (None)."""
        now = self.clock()
        if result is not None:
            self.recent.append((now, result.seconds, result.images))
        while self.recent and now - self.recent[0][0] > WINDOW_S:
            self.recent.popleft()
        for state, count in (
            ("finished", progress.finished),
            ("raced_out", progress.raced_out),
            ("failed", progress.failed),
            ("running", progress.running),
        ):
            self._set("vitpareto_trials", count, state=state)
        self._set("vitpareto_front_size", len(progress.front))
        self._set("vitpareto_hypervolume", progress.hypervolume)
        busy, images = self.rates(now)
        self._set("vitpareto_worker_busy_share", busy)
        self._set("vitpareto_images_per_second", images)
        self._set("vitpareto_outbox_depth", self.unsent())

    def rates(self, now: float) -> tuple[float, float]:
        """(fraction of the workers' time spent measuring, images per second) of the last minute."""
        span = min(WINDOW_S, now - self.start)
        if span <= 0:
            return 0.0, 0.0
        # of a trial that started before the window only the part inside counts
        busy = sum(min(seconds, span - (now - end)) for end, seconds, _ in self.recent)
        return min(1.0, busy / (self.workers * span)), sum(n for *_, n in self.recent) / span

    def _set(self, name: str, value: float, **tags: str) -> None:
        self.gauges[name].set(float(value), {"study": self.study, **tags})
