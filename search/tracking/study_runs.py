"""The runs of one study on one MLflow server, compared with what they should contain and updated.

Every run has the study's id and its trial as tags, so that runs that are incomplete, or created
twice by a request that timed out, are found again. Never reads or changes a study. Every method
raises what MLflow raises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from vitpareto.search.tracking.artifacts import ArtifactSet, artifact_names, upload
from vitpareto.search.tracking.client import TIMEOUT_S
from vitpareto.search.tracking.run_contents import (
    CERTIFIED_PREFIX,
    STUDY_ID_TAG,
    TRIAL_TAG,
    CurvePoint,
    RunSpec,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

#: MLflow's limits of entries per request
MAX_BATCH_METRICS, MAX_RUNS_PER_PAGE = 1000, 1000
#: tag of the study's run with the digest of its artifacts
ARTIFACTS_TAG = "vitpareto.artifacts"

Outcome = Literal["created", "updated", "unchanged", "refused"]


@dataclass
class StoredRun:
    """A run as the server has it."""

    run_id: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @classmethod
    def of(cls, run: Run) -> StoredRun:
        data = run.data
        return cls(
            run.info.run_id, run.info.status, dict(data.params), dict(data.metrics), dict(data.tags)
        )

    def conflicts_with(self, spec: RunSpec) -> bool:
        """Whether the run cannot become `spec`: parameters and metrics cannot be taken back.

        Happens if another version wrote the run, or if the study lost its certificates.
        """
        return any(self.params.get(k, v) != v for k, v in spec.params.items()) or any(
            k.startswith(CERTIFIED_PREFIX) and k not in spec.metrics for k in self.metrics
        )


@dataclass(frozen=True)
class Metric:
    """A value of a metric, at a time in ms since 1970."""

    name: str
    value: float
    when_ms: int
    step: int = 0


class StudyRuns:
    """The runs of a study on a server.

    Attributes:
        runs: what the server has, by trial; the study's own run has the key None.
        duplicates: how many runs were deleted because a trial had two.
        refused: why the server rejected a run, by trial.
    """

    def __init__(self, client: MlflowClient, experiment: str, study_id: str) -> None:
        self.client, self.experiment, self.study_id = client, experiment, study_id
        self.runs: dict[int | None, StoredRun] = {}
        self.duplicates = 0
        self.refused: dict[int | None, str] = {}
        self.read()

    def read(self) -> None:
        """Read all runs of the study. Of two runs of a trial the more complete one stays."""
        self.runs = {}
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                f"tags.`{STUDY_ID_TAG}` = '{self.study_id}'",
                max_results=MAX_RUNS_PER_PAGE,
                page_token=token,
            )
            for run in page:
                self._add(StoredRun.of(run))
            token = page.token
            if not token:
                return

    def _add(self, run: StoredRun) -> None:
        trial = int(run.tags[TRIAL_TAG]) if TRIAL_TAG in run.tags else None
        first = self.runs.setdefault(trial, run)
        if first is run:
            return
        worse, better = sorted(
            (first, run), key=lambda r: (len(r.metrics), r.status != "RUNNING", r.run_id)
        )
        self.client.delete_run(worse.run_id)
        self.runs[trial] = better
        self.duplicates += 1

    @property
    def parent(self) -> StoredRun | None:
        """The study's own run."""
        return self.runs.get(None)

    def put(self, spec: RunSpec) -> Outcome:
        """Make the server's run equal to `spec`.

        "refused" if the server will never accept it: later runs must not wait for it. `refused`
        then has the reason, and the run ends as FAILED.
        """
        try:
            return self._put(spec)
        except Exception as error:
            if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                raise
            self.refused[spec.trial] = str(error)
            if (run := self.runs.get(spec.trial)) is not None and run.status == "RUNNING":
                self._end(run, "FAILED")
            return "refused"

    def _put(self, spec: RunSpec) -> Outcome:
        tags = {STUDY_ID_TAG: self.study_id, "mlflow.source.name": "vitpareto", **spec.tags}
        if spec.trial is not None:
            assert self.parent is not None, "the study's own run is put first"
            tags["mlflow.parentRunId"] = self.parent.run_id
        spec = replace(spec, tags=tags)
        run = self.runs.get(spec.trial)
        if run is not None and run.conflicts_with(spec):
            self.client.delete_run(run.run_id)
            run = None
        if run is None:
            self._create(spec)
            return "created"
        return "updated" if self._update(run, spec) else "unchanged"

    def _create(self, spec: RunSpec) -> None:
        began = time.monotonic()
        created = self.client.create_run(
            self.experiment, start_time=spec.begin_ms, tags=spec.tags, run_name=spec.name
        )
        self.runs[spec.trial] = StoredRun(created.info.run_id, "RUNNING", {}, {}, dict(spec.tags))
        if time.monotonic() - began >= TIMEOUT_S:
            # the request was repeated, and both may have created a run
            self.read()
        self._update(self.runs[spec.trial], spec, when_ms=spec.end_ms)

    def _update(self, run: StoredRun, spec: RunSpec, when_ms: int | None = None) -> bool:
        """Send what differs. A later time replaces the value of a metric."""
        when = when_ms if when_ms and not run.metrics else int(1e3 * time.time())
        params = {k: v for k, v in spec.params.items() if k not in run.params}
        tags = {k: v for k, v in spec.tags.items() if run.tags.get(k) != v}
        metrics = [
            Metric(k, v, when)
            for k, v in spec.metrics.items()
            # a database column may hold fewer digits than a float
            if not math.isclose(run.metrics.get(k, math.nan), v, rel_tol=1e-9, abs_tol=1e-300)
        ]
        if params or tags or metrics:
            self._log(run, metrics, params, tags)
        if run.status == spec.status:
            return bool(params or tags or metrics)
        if spec.status == "RUNNING":
            self.client.update_run(run.run_id, status="RUNNING")
            run.status = "RUNNING"
        else:
            self._end(run, spec.status, spec.end_ms or None)
        return True

    def _end(self, run: StoredRun, status: str, end_ms: int | None = None) -> None:
        self.client.set_terminated(run.run_id, status, end_ms)
        run.status = status

    def _log(
        self,
        run: StoredRun,
        metrics: Sequence[Metric],
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow import entities

        self.client.log_batch(
            run.run_id,
            [entities.Metric(m.name, m.value, m.when_ms, m.step) for m in metrics],
            [entities.Param(k, v) for k, v in (params or {}).items()],
            [entities.RunTag(k, v) for k, v in (tags or {}).items()],
        )
        run.metrics.update({m.name: m.value for m in metrics})
        run.params.update(params or {})
        run.tags.update(tags or {})

    def set_on_front(self, trial: int, on_front: bool, rank: int | None) -> None:
        """Update the run of a trial that entered or left the front, if it exists and differs."""
        run = self.runs.get(trial)
        tag = "true" if on_front else "false"
        if run is None or run.tags.get("pareto") == tag:
            return
        now = int(1e3 * time.time())
        metrics = [] if rank is None else [Metric("pareto_rank", float(rank), now)]
        self._log(run, metrics, tags={"pareto": tag})

    def on_front(self) -> set[int]:
        """The trials that are on the front according to their runs."""
        return {t for t, r in self.runs.items() if t is not None and r.tags.get("pareto") == "true"}

    def curve_steps(self) -> set[int]:
        """The steps for which the server has a hypervolume."""
        assert self.parent is not None
        history = self.client.get_metric_history(self.parent.run_id, "hypervolume")
        return {m.step for m in history}

    def log_curve(self, points: Sequence[CurvePoint]) -> None:
        """Add points to the hypervolume of the study's run."""
        assert self.parent is not None
        for start in range(0, len(points), MAX_BATCH_METRICS):
            batch = points[start : start + MAX_BATCH_METRICS]
            self._log(
                self.parent,
                [Metric("hypervolume", p.hypervolume, p.when_ms, p.step) for p in batch],
            )

    def put_artifacts(self, artifacts: ArtifactSet) -> bool:
        """Upload the artifacts of the study's run. False if it has them already."""
        assert self.parent is not None
        existing = artifact_names(self.client, self.parent.run_id)
        unchanged = self.parent.tags.get(ARTIFACTS_TAG) == artifacts.digest
        if unchanged and artifacts.names <= existing:
            return False
        upload(self.client, self.parent.run_id, artifacts, existing)
        self._log(self.parent, [], tags={ARTIFACTS_TAG: artifacts.digest})
        return True

    def close(self, keep: Collection[int | None]) -> int:
        """End the runs of other trials that are still RUNNING; returns how many."""
        stale = [r for t, r in self.runs.items() if r.status == "RUNNING" and t not in keep]
        for run in stale:
            self._end(run, "KILLED")
        return len(stale)

    def remove(self, keep: Collection[int | None]) -> int:
        """Delete the runs of other trials (MLflow can restore them); returns how many."""
        extra = [t for t in self.runs if t not in keep]
        for trial in extra:
            self.client.delete_run(self.runs.pop(trial).run_id)
        return len(extra)
