"""Makes the runs on a server equal to the study on disk. Never changes the study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vitpareto.search.study.certificates import measured
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking.artifacts import ArtifactSet
from vitpareto.search.tracking.experiment import put_views
from vitpareto.search.tracking.page import StudyPage
from vitpareto.search.tracking.run_contents import RunSpec, hypervolume_curve, trial_runs
from vitpareto.search.tracking.study_run import study_run
from vitpareto.search.tracking.study_runs import StudyRuns


@dataclass(frozen=True)
class SyncReport:
    """How many runs were changed, the study's own run included.

    Attributes:
        created: did not exist.
        updated: differed from the study.
        closed: were left RUNNING by a process that was killed.
        unchanged: were equal to the study.
        removed: belonged to no trial of the study, or were a second run of a trial.
        refused: why the server rejected a run, by trial (None: the study's own run).
    """

    created: int = 0
    updated: int = 0
    closed: int = 0
    unchanged: int = 0
    removed: int = 0
    refused: dict[int | None, str] = field(default_factory=dict)


def reconcile(
    runs: StudyRuns,
    folder: StudyFolder,
    *,
    running: bool = False,
    ended: str = "",
    page: StudyPage | None = None,
) -> SyncReport:
    """Update the server wherever it differs from the study. Raises whatever MLflow raises.

    Args:
        runs: the study's runs on the server.
        folder: the study.
        running: whether the search runs.
        ended: why it ended; empty if it runs or was interrupted.
        page: artifacts and table of the study's run; None leaves those on the server unchanged.
    """
    return _Reconciliation(runs, folder).run(running, ended, page)


class _Reconciliation:
    def __init__(self, runs: StudyRuns, folder: StudyFolder) -> None:
        self.runs, self.folder = runs, folder
        self.counts: Counter[str] = Counter()

    def run(self, running: bool, ended: str, page: StudyPage | None) -> SyncReport:
        results, objectives = measured(self.folder), self.folder.objectives
        put_views(self.runs.client, self.runs.experiment, objectives)
        status = "RUNNING" if running else "FINISHED" if ended else "KILLED"
        note = page.note if page else ""
        parent = study_run(self.folder, results, status=status, reason=ended, note=note)
        first_outcome = ""
        if running or self.runs.parent is None:
            first_outcome = self._put(replace(parent, status="RUNNING"))
        removed = self._put_trials(results, running=running)
        changed = self._put_curve(results)
        if page is not None:
            changed |= self.runs.put_artifacts(ArtifactSet.of(self.folder, page))
        # last, so that a study's run has ended only when everything is on the server
        if first_outcome == "created":
            self.runs.put(parent)
        elif not first_outcome:
            first_outcome = self._put(parent)
        if first_outcome == "unchanged" and changed:
            self.counts["unchanged"] -= 1
            self.counts["updated"] += 1
        counted = {k: self.counts[k] for k in ("created", "updated", "closed", "unchanged")}
        return SyncReport(**counted, removed=removed, refused=dict(self.runs.refused))

    def _put(self, spec: RunSpec) -> str:
        run = self.runs.runs.get(spec.trial)
        was_running = run is not None and run.status == "RUNNING"
        outcome: str = self.runs.put(spec)
        if was_running and spec.status != "RUNNING" and outcome == "updated":
            outcome = "closed"
        self.counts[outcome] += 1
        return outcome

    def _put_trials(self, results: Sequence[TrialResult], *, running: bool) -> int:
        """Update the runs of trials; returns how many runs were removed."""
        for spec in trial_runs(
            results,
            study=self.folder.name,
            objectives=self.folder.objectives,
            recovered=measured(self.folder, recovered=True),
        ):
            self._put(spec)
        trials: set[int | None] = {None, *(r.trial for r in results)}
        self.counts["closed"] += self.runs.close(keep=trials)
        return self.runs.duplicates + (0 if running else self.runs.remove(keep=trials))

    def _put_curve(self, results: Sequence[TrialResult]) -> bool:
        """Add the points that the server does not have; returns whether there were any."""
        steps = self.runs.curve_steps()
        curve = hypervolume_curve(results, self.folder.objectives)
        missing = [point for point in curve if point.step not in steps]
        self.runs.log_curve(missing)
        return bool(missing)
