"""The session of a study in one driver: proposes trials, records their results, decides the end.

It may not import ray; `search.trials.searcher` connects it to Ray Tune. The study folder is the
source of truth: a session starts from it, and a result is written to it before Optuna and the hooks
receive it.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.trial import TrialState

from vitpareto.methods import ModelShape, Recipe
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.optuna_storage import open_storage, study_name
from vitpareto.search.study.optuna_trials import (
    INTERRUPTED,
    RACED_OUT_AS,
    OptunaTrials,
    RacedOutAs,
)
from vitpareto.search.study.progress import GROWTH, ProgressHook, ProgressTracker, StudyProgress
from vitpareto.search.study.proposals import Proposal, Proposals
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.rungs import RungReport
from vitpareto.search.study.samplers import make_sampler
from vitpareto.search.study.space import Space

#: Proposals in a row that need no measurement, after which the space counts as exhausted.
MAX_SKIPPED = 100
#: Seconds between two attempts to reach Optuna's storage.
STORAGE_RETRY_S = 1.0

log = logging.getLogger("vitpareto")


class RungRule(Protocol):
    """Decides at a rung whether a trial goes on."""

    def on_result(self, result: TrialResult) -> None:
        """Take a durable result into account."""

    def on_rung(self, trial: int, recipe: Recipe, report: RungReport) -> TrialResult | None:
        """Return the result of a trial that stops here; None if it goes on."""


@dataclass(frozen=True)
class SessionSettings:
    """What a session proposes, and when it stops.

    Attributes:
        objectives: names of the objectives.
        sampler: one of the samplers that `make_sampler` knows.
        seed: of the sampler.
        trials: number of trials to measure; None without a limit.
        window: accepted costs.
        raced_out_as: state in Optuna of a trial that was stopped early.
        patience: stop after this many trials without growth of the hypervolume.
        seconds: start no new trials after this long.
    """

    objectives: tuple[str, ...]
    sampler: str
    seed: int
    trials: int | None
    window: BudgetWindow = BudgetWindow()
    raced_out_as: RacedOutAs = RACED_OUT_AS
    patience: int | None = None
    seconds: float | None = None

    def limit_reached(self, progress: StudyProgress, elapsed: float) -> str:
        """Return which limit ends the session; "" if none does.

        elapsed: seconds since the start of the session.
        """
        done, without_growth = progress.done, progress.trials_without_growth
        if self.trials is not None and done >= self.trials:
            return f"{done} trials measured"
        if self.seconds is not None and elapsed >= self.seconds:
            return f"the time limit of {self.seconds:g} s is reached; {done} trials measured"
        if self.patience is not None and without_growth >= self.patience:
            return (
                f"the hypervolume has not grown by {GROWTH:.1%} for {without_growth} trials; "
                f"{done} measured"
            )
        return ""


class StudySession:
    """Proposes candidates and records their results.

    The caller identifies a running trial by an id. Hooks are called with every new
    result and the progress; a hook that raises is logged and does not stop the search.
    """

    def __init__(
        self,
        folder: StudyFolder,
        space: Space,
        settings: SessionSettings,
        *,
        shape_of: Callable[[Recipe], ModelShape],
        hooks: Sequence[ProgressHook] = (),
        early_stopping: RungRule | None = None,
        storage: optuna.storages.BaseStorage | None = None,
    ) -> None:
        """Start or continue the study in `folder`.

        Args:
            folder: the study, locked by this process.
            space: what may be proposed.
            settings: see `SessionSettings`.
            shape_of: returns the model's shape after a recipe's structural step.
            hooks: called with results and progress.
            early_stopping: decides at every rung; None measures every trial in full.
            storage: Optuna's storage; None uses the folder's journal.
        """
        self.folder, self.settings, self.hooks = folder, settings, list(hooks)
        self.early_stopping, self.start = early_stopping, time.monotonic()
        objectives = objectives_named(settings.objectives)
        self.study = optuna.create_study(
            storage=open_storage(folder) if storage is None else storage,
            study_name=study_name(folder),
            directions=[o.direction for o in objectives],
            load_if_exists=True,
        )
        self.tracker = ProgressTracker(objectives, settings.trials)
        self.trials = OptunaTrials(self.study, objectives, settings.raced_out_as)
        self.proposals = Proposals(self.trials, space, settings.window, shape_of, self.progress)
        #: proposals that workers measure now, by the caller's id
        self.running: dict[str, Proposal] = {}
        self._storage_unavailable = False
        self._continue()

    @property
    def progress(self) -> StudyProgress:
        return self.tracker.progress

    def _continue(self) -> None:
        """Bring Optuna to the state of the folder, and retry the trials that were interrupted."""
        results = {r.trial: r for r in self.folder.trials.all()}
        self.trials.restore(results)
        past = self.trials.frozen()
        # another seed after a restart, so that the sampler does not repeat its draws
        self.study.sampler = make_sampler(self.settings.sampler, self.settings.seed + len(past))
        for result in results.values():
            self._remember(result)
        for frozen in past:
            if frozen.state == TrialState.RUNNING and frozen.number in results:
                self.trials.tell(frozen.number, results[frozen.number])
            elif frozen.state == TrialState.RUNNING:
                self._save_failed(self.trials.retry(frozen, INTERRUPTED))
        self.trials.enqueue_initial(self.proposals.space)

    # -- proposals -------------------------------------------------------------------------------

    def next(self, trial_id: str) -> Proposal | None:
        """Return the next candidate to measure, or None.

        If None, `progress.ended` is set if the session has ended; otherwise ask again later.
        """
        if self.progress.ended:
            return None
        limit = self.settings.limit_reached(self.progress, time.monotonic() - self.start)
        if limit:
            self._end(limit)
            return None
        requested = self.settings.trials
        if requested is not None and self.progress.done + len(self.running) >= requested:
            return None  # a running trial may fail and be retried
        if self.tracker.front is None and self.running:
            return None  # early stopping and the front need the dense model first
        for _ in range(MAX_SKIPPED):
            try:
                proposal = self.proposals.ask(self.running.values())
            except optuna.exceptions.StorageInternalError as error:
                self._wait_for_storage(error)
                return None
            self._storage_unavailable = False
            if proposal is not None:
                self.running[trial_id] = proposal
                self._report(None)
                return proposal
        if not self.running:  # otherwise results may lead to new proposals
            where = "inside the budget window " if self.proposals.outside else ""
            self._end(f"{MAX_SKIPPED} proposals in a row were not new: the space {where}"
                      "is exhausted")  # fmt: skip
        return None

    def _end(self, reason: str) -> None:
        self.progress.ended = reason
        self._report(None)

    def _wait_for_storage(self, error: Exception) -> None:
        if not self._storage_unavailable:
            log.warning("Optuna's storage does not answer; retrying: %s", _first_line(error))
        self._storage_unavailable = True
        time.sleep(STORAGE_RETRY_S)

    # -- results ---------------------------------------------------------------------------------

    def on_rung(self, trial_id: str, report: RungReport) -> bool:
        """Return whether a trial goes on to its next rung. Never raises.

        The result of a trial that stops is durable when this returns.
        """
        proposal = self.running.get(trial_id)
        if proposal is None or self.early_stopping is None:
            return True
        try:
            stopped = self.early_stopping.on_rung(proposal.number, proposal.recipe, report)
            if stopped is None:
                return True
            self.folder.trials.write(stopped)
            shutil.rmtree(self.folder.training(proposal.key), ignore_errors=True)
            return False
        except Exception:
            log.exception("early stopping of trial %d failed; the trial goes on", proposal.number)
            return True

    def complete(
        self, trial_id: str, *, violation: float | None = None, worker_died: bool = False
    ) -> None:
        """Record the end of a trial. Idempotent, and never raises.

        Args:
            trial_id: as given to `next`.
            violation: GMACs outside the budget window, if the worker found the candidate there.
            worker_died: whether the worker died before the result was durable.
        """
        proposal = self.running.pop(trial_id, None)
        if proposal is None:
            return
        try:
            self._complete(proposal, violation, worker_died)
        except Exception:
            log.exception("trial %d was not recorded in Optuna; its result file remains",
                          proposal.number)  # fmt: skip

    def _complete(self, proposal: Proposal, violation: float | None, worker_died: bool) -> None:
        result = self.folder.trials.get(proposal.number)
        if result is not None:
            self._remember(result)
            self.trials.tell(proposal.number, result)
            for trial in proposal.waiting:
                self.trials.tell(trial.number, result)
            self._report(result)
            return
        if violation is not None:
            for trial in (proposal.trial, *proposal.waiting):
                self.proposals.tell_outside(trial, proposal.key, violation)
            self._report(None)
            return
        frozen = self.trials.frozen()[proposal.number]
        for trial in proposal.waiting:
            self.trials.tell_dropped(trial)
        reason = "the worker died" if worker_died else "stopped before it was measured"
        failed = self._save_failed(self.trials.retry(frozen, reason))
        if failed is not None:
            self._report(failed)

    def _save_failed(self, result: TrialResult | None) -> TrialResult | None:
        if result is not None:
            self.folder.trials.write(result)
            self._remember(result)
        return result

    def _remember(self, result: TrialResult) -> None:
        self.proposals.remember(result)
        if self.early_stopping is not None:
            self.early_stopping.on_result(result)
        self.tracker.add(result)

    def _report(self, result: TrialResult | None) -> None:
        self.progress.running = len(self.running)
        for hook in self.hooks:
            try:
                hook(result, self.progress)
            except Exception:
                log.exception("a progress hook failed; the search continues")


def _first_line(error: Exception) -> str:
    return (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
