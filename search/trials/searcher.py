"""The study as a Ray Tune searcher.

A thin adapter: `search.study.session` decides what to measure next and when to stop. Ray's own
OptunaSearch tells stopped multi-objective trials as complete and leaves NaN trials running, and
Tuner.restore forgets or duplicates trials, so nothing is read from Ray's state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from vitpareto.methods import BadInput
from vitpareto.search.study.progress import StudyProgress
from vitpareto.search.study.session import StudySession
from vitpareto.search.trials.trial_actor import REFUSED, RUNG


class FrontSearcher(Searcher):
    """Gives Ray the session's proposals, and the session what Ray reports."""

    def __init__(self, session: StudySession) -> None:
        super().__init__(metric="top1", mode="max")
        self.session = session
        #: propose nothing the next time Ray asks, so that it starts a pending trial first
        self.skip_next = False
        #: why a worker cannot take part; the search ends with it
        self.refusal: BadInput | None = None

    @property
    def progress(self) -> StudyProgress:
        return self.session.progress

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config; None if there is none now, FINISHED at the end."""
        if self.progress.ended or self.refusal is not None:
            return Searcher.FINISHED
        if self.skip_next:
            self.skip_next = False
            return None
        proposal = self.session.next(trial_id)
        if proposal is None:
            return Searcher.FINISHED if self.progress.ended else None
        return proposal.config()

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the scheduler calls `goes_on`."""

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether a trial goes on to its next rung. Never raises.

        The result of a trial that stops is durable when this returns.
        """
        report = result.get(RUNG)
        return report is None or self.session.on_rung(trial_id, report)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Idempotent, and never raises: Ray would call it again, without the result."""
        if result is not None and result.get(REFUSED) is not None:
            # the trial stays running in Optuna's storage: the next driver enqueues it again
            self.refusal = result[REFUSED]
            return
        violation = None
        if result is not None and result.get("outside"):
            violation = float(result["violation"])
        self.session.complete(trial_id, violation=violation, worker_died=error)

    # -- persistence: the study folder is the truth, and nothing is read from Ray's copies -------

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Ray pickles the searcher at the start and never reads it; hooks hold threads."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrontSearcher:
        """Return itself: a copy would ask and tell beside the original."""
        return self

    def save(self, checkpoint_path: str) -> None:
        """Write a placeholder."""
        Path(checkpoint_path).write_text("see the study folder\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""
