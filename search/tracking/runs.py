"""A study as MLflow runs: what each run says, and the few calls that make a server say it.

`runs_of` is a pure function of what is on disk. `Mirror` is the one place that calls MLflow: it
compares what a server has with that, and changes what differs. It may not read, write or repair a
study. Every run carries the study's id and its trial number as tags, so that whatever was half
done, or done twice by a request that timed out, is found again and settled.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitpareto.methods import Recipe
from vitpareto.search.stats.pareto import rank
from vitpareto.search.study.front import Front, front_of, reference_point
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking.client import TIMEOUT_S
from vitpareto.search.tracking.views import view_tags

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

#: what MLflow takes at most, in characters of a value and in entries of a batch
LONGEST_TAG, LONGEST_PARAM, LARGEST_BATCH = 8000, 6000, 1000
PAGE = 1000
#: server tags: which study a run is of, which trial; the study's own run has no trial
STUDY_ID, TRIAL = "vitpareto.study_id", "trial"
#: opens the experiment on its runs; MLflow's pages take it for one of language models otherwise
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
#: metrics of the held-out images begin so; they go again where a study is certified no more
CERTIFIED = "certified_"
#: what uploaded artifacts were made of, so that equal ones are not uploaded again
CONTENT = "vitpareto.artifacts"


@dataclass(frozen=True)
class RunSpec:
    """What one run has to say. `trial` None: the study's own run. Times in ms since 1970."""

    trial: int | None
    name: str
    status: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    begin_ms: int = 0
    end_ms: int = 0


@dataclass(frozen=True)
class CurvePoint:
    """The hypervolume after the `step`-th result of a study."""

    step: int
    value: float
    when_ms: int


def experiment_of(name: str) -> str:
    """The experiment of a study: `vitpareto/NAME`, as a server is shared with other projects."""
    return f"vitpareto/{name}"


# ---------------------------------------------------------------------------- what runs should say


def ranks_of(results: Iterable[TrialResult], objectives: Sequence[str]) -> dict[int, int]:
    """Non-domination rank by trial: 0 for exactly the front's members, 1 and up for the others."""
    axes = objectives_named(objectives)
    finished = [r for r in results if r.state == "finished"]
    if not finished:
        return {}
    points = [[r.values[o.name] for o in axes] for r in finished]
    ranks = rank(points, [o.sign for o in axes])
    front = {r.trial for r in front_of(finished, axes)}
    # of exact duplicates only the first is on the front: the others lie right behind it
    return {
        r.trial: 0 if r.trial in front else max(1, int(n))
        for r, n in zip(finished, ranks, strict=True)
    }


def trial_run(
    result: TrialResult,
    *,
    study: str,
    front: bool,
    rank: int | None,
    recovered: TrialResult | None = None,
    recovered_front: bool = False,
) -> RunSpec:
    """The run of one trial. Of one that was stopped early `top1` is no metric, so that none who
    sorts by it takes an estimate for a measurement: `top1_estimate` is. A failed one ends FAILED
    with its reason. `recovered`: the same trial after fine-tuning, whose values stand beside its
    own.
    """
    metrics: dict[str, float] = {}
    if result.state == "finished":
        metrics = {k: float(v) for k, v in result.values.items() if math.isfinite(v)}
        metrics |= _certified(result)
        if rank is not None:
            metrics["pareto_rank"] = float(rank)
    elif result.state == "raced_out":
        costs = {k: v for k, v in result.values.items() if k not in ("top1", "top5")}
        metrics = {k: float(v) for k, v in costs.items() if math.isfinite(v)}
        metrics |= {"top1_estimate": result.values["top1"], "images_seen": float(result.images)}
    params = {"method": result.method}
    for part, prefix in (("structure", "structure."), ("tokens", "")):
        for name, value in (result.recipe.get(part) or {}).items():
            if prefix or name != "method":
                params[f"{prefix}{name}"] = _cut(_text(value), LONGEST_PARAM)
    recipe = yaml.safe_dump(result.recipe, sort_keys=False, default_flow_style=None, width=100)
    tags = {
        "method": result.method,
        "pareto": "true" if front else "false",
        TRIAL: str(result.trial),
        "study": study,
        "state": result.state,
        "recipe": _cut(recipe, LONGEST_TAG),
    }
    if result.reason:
        tags["reason"] = _cut(result.reason, LONGEST_TAG)
    if weights := (result.resolved or {}).get("weights"):
        tags["weights"] = weights
    if result.certified is not None and result.certified.worst is not None:
        worst = result.certified.worst
        noise = "" if worst.beyond_noise else "; within noise"
        tags["worst_class"] = f"{worst.name} ({worst.drop:.1f} points of {worst.images}{noise})"
    if recovered is not None:
        tags["recovered"] = recovered.state
        tags["recovered_pareto"] = "true" if recovered_front else "false"
        metrics |= {f"recovered_{k}": recovered.values[k] for k in ("top1", "top5")
                    if k in recovered.values}  # fmt: skip
        metrics |= _certified(recovered, f"{CERTIFIED}recovered_")
    return RunSpec(
        trial=result.trial,
        name=f"{result.trial} {_line(result)}"[:250],
        status="FAILED" if result.state == "failed" else "FINISHED",
        params=params,
        metrics=metrics,
        tags=tags,
        begin_ms=result.begun_ms,
        end_ms=result.ended_ms,
    )


def _certified(result: TrialResult, prefix: str = CERTIFIED) -> dict[str, float]:
    """What a trial is on the held-out images; nothing where it is not certified."""
    own = result.certified
    if own is None:
        return {}
    found = {
        "top1": own.top1,
        "top1_low": own.low,
        "top1_high": own.high,
        "images": own.images,
        "change": own.change,
        "change_low": own.change_low,
        "change_high": own.change_high,
    }
    if own.worst is not None:
        found |= {"lost": own.lost, "gained": own.gained, "worst_class_drop": own.worst.drop}
    return {f"{prefix}{k}": float(v) for k, v in found.items() if v is not None}


def _line(result: TrialResult) -> str:
    try:
        return str(Recipe.from_dict(result.recipe))
    except Exception:  # written by a version with other methods: its name is still worth showing
        return result.method


def runs_of(
    results: Sequence[TrialResult],
    *,
    study: str,
    objectives: Sequence[str],
    recovered: Sequence[TrialResult] = (),
) -> list[RunSpec]:
    """The runs of all trials, by trial number; `recovered`: those that were fine-tuned since."""
    ranks, again = ranks_of(results, objectives), ranks_of(recovered, objectives)
    healed = {r.trial: r for r in recovered}
    return [
        trial_run(
            r, study=study, front=ranks.get(r.trial) == 0, rank=ranks.get(r.trial),
            recovered=healed.get(r.trial), recovered_front=again.get(r.trial) == 0,
        )
        for r in results
    ]  # fmt: skip


def curve_of(results: Iterable[TrialResult], objectives: Sequence[str]) -> list[CurvePoint]:
    """The hypervolume after each result, in the order in which they ended."""
    axes = objectives_named(objectives)
    names = {o.name for o in axes}
    ordered = sorted(results, key=lambda r: (r.ended_ms, r.trial))
    early: list[TrialResult] = []
    front: Front | None = None
    out = []
    for step, result in enumerate(ordered, 1):
        if result.state == "finished":
            early.append(result)
            if front is None and result.is_reference:
                dense = {k: v for k, v in result.values.items() if k in names}
                front = Front(axes, reference_point(dense, axes))
            if front is not None:
                for one in early:
                    front.add(one.trial, one.values)
                early.clear()
        volume = front.hypervolume() if front is not None else 0.0
        out.append(CurvePoint(step, volume, result.ended_ms))
    return out


def note_that_fits(note: str) -> str:
    """Markdown for a tag: cut at a line's end where it is longer than MLflow takes."""
    return _cut(note, LONGEST_TAG, "\n\n… cut here; all of it is in the artifacts.")


def _cut(text: str, longest: int, mark: str = " …") -> str:
    if len(text) <= longest:
        return text
    kept = text[: longest - len(mark)]
    return (kept[: kept.rfind("\n")] if "\n" in mark and "\n" in kept else kept) + mark


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


# --------------------------------------------------------------------------- what a server is told


@dataclass
class _Known:
    """A run as the server has it."""

    run_id: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @classmethod
    def of(cls, run: Run) -> _Known:
        data = run.data
        return cls(
            run.info.run_id, run.info.status, dict(data.params), dict(data.metrics), dict(data.tags)
        )


class Mirror:
    """The runs of one study on one server. Every method raises what MLflow raises."""

    def __init__(
        self,
        client: MlflowClient,
        study: str,
        study_id: str,
        artifacts: str | None = None,
        own: bool = False,
    ) -> None:
        """artifacts: where a new experiment puts its files; None: where the server likes. own: the
        database is that place's, and an experiment with files elsewhere was copied or moved here.
        """
        self.client, self.study, self.study_id = client, study, study_id
        self.experiment = self._experiment(artifacts, own)
        self.runs: dict[int | None, _Known] = {}
        self.duplicates = 0
        self.refused: dict[int | None, str] = {}
        self.read()

    def _experiment(self, artifacts: str | None, own: bool) -> str:
        name = experiment_of(self.study)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            made: str = self.client.create_experiment(
                name, artifact_location=artifacts, tags=EXPERIMENT_TAGS
            )
            return made
        known = str(found.experiment_id)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(known)
        if not own or artifacts is None or found.artifact_location.startswith(artifacts):
            return known
        # its runs would write into the place it came from: it makes room (MLflow can restore it)
        self.client.rename_experiment(known, f"{name} of {found.artifact_location} ({known})")
        self.client.delete_experiment(known)
        return self._experiment(artifacts, own)

    def read(self) -> None:
        """Learn what the server has; of runs made twice by a late answer one is kept."""
        self.runs = {}
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                f"tags.`{STUDY_ID}` = '{self.study_id}'",
                max_results=PAGE,
                page_token=token,
            )
            for run in page:
                self._file(_Known.of(run))
            token = page.token
            if not token:
                return

    def _file(self, run: _Known) -> None:
        trial = int(run.tags[TRIAL]) if TRIAL in run.tags else None
        kept = self.runs.setdefault(trial, run)
        if kept is run:
            return
        worse, better = sorted(
            (kept, run), key=lambda r: (len(r.metrics), r.status != "RUNNING", r.run_id)
        )
        self.client.delete_run(worse.run_id)
        self.runs[trial] = better
        self.duplicates += 1

    @property
    def parent(self) -> _Known | None:
        return self.runs.get(None)

    def put_views(self, objectives: Sequence[str]) -> None:
        """The experiment's saved views, where it has not got them."""
        known = self.client.get_experiment(self.experiment).tags
        for key, value in view_tags(objectives, known, int(1e3 * time.time())).items():
            self.client.set_experiment_tag(self.experiment, key, value)

    def put(self, spec: RunSpec) -> str:
        """Make the server say this: "created", "updated" or "unchanged"; "refused" where it will
        never take it (`refused` has the reason): what waits behind it must not wait for ever.
        """
        try:
            return self._put(spec)
        except Exception as error:
            if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                raise
            self.refused[spec.trial] = str(error)
            if (known := self.runs.get(spec.trial)) is not None and known.status == "RUNNING":
                self.client.set_terminated(known.run_id, "FAILED")
                known.status = "FAILED"
            return "refused"

    def _put(self, spec: RunSpec) -> str:
        tags = {STUDY_ID: self.study_id, "mlflow.source.name": "vitpareto", **spec.tags}
        if spec.trial is not None:
            assert self.parent is not None, "the study's own run is put first"
            tags["mlflow.parentRunId"] = self.parent.run_id
        spec = replace(spec, tags=tags)
        known = self.runs.get(spec.trial)
        if known is not None and (
            any(known.params.get(k, v) != v for k, v in spec.params.items())
            or any(k.startswith(CERTIFIED) and k not in spec.metrics for k in known.metrics)
        ):
            # a parameter cannot be changed, nor a metric taken back: this run was written by
            # another version, or before the study lost its certificates
            self.client.delete_run(known.run_id)
            known = None
        if known is None:
            self._create(spec)
            return "created"
        return "updated" if self._update(known, spec) else "unchanged"

    def _create(self, spec: RunSpec) -> None:
        began = time.monotonic()
        run = self.client.create_run(
            self.experiment, start_time=spec.begin_ms, tags=spec.tags, run_name=spec.name
        )
        known = _Known(run.info.run_id, "RUNNING", {}, {}, dict(spec.tags))
        self.runs[spec.trial] = known
        if time.monotonic() - began >= TIMEOUT_S:
            # the request was repeated, and the first may have come through as well
            self.read()
            known = self.runs[spec.trial]
        self._update(known, spec, when_ms=spec.end_ms)

    def _update(self, known: _Known, spec: RunSpec, when_ms: int | None = None) -> bool:
        """Send what differs. A number already there is superseded by one with a later time."""
        when = when_ms if when_ms and not known.metrics else int(1e3 * time.time())
        params = {k: v for k, v in spec.params.items() if k not in known.params}
        tags = {k: v for k, v in spec.tags.items() if known.tags.get(k) != v}
        metrics = {
            k: v
            for k, v in spec.metrics.items()
            # a server's column may hold fewer digits than Python's float
            if not math.isclose(known.metrics.get(k, math.nan), v, rel_tol=1e-9, abs_tol=1e-300)
        }
        if params or tags or metrics:
            self._log(known, [(k, v, when, 0) for k, v in metrics.items()], params, tags)
        if known.status != spec.status:
            if spec.status == "RUNNING":
                self.client.update_run(known.run_id, status="RUNNING")
            else:
                self.client.set_terminated(known.run_id, spec.status, spec.end_ms or None)
            known.status = spec.status
            return True
        return bool(params or tags or metrics)

    def _log(
        self,
        known: _Known,
        metrics: Sequence[tuple[str, float, int, int]],
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self.client.log_batch(
            known.run_id,
            [Metric(*m) for m in metrics],
            [Param(k, v) for k, v in (params or {}).items()],
            [RunTag(k, v) for k, v in (tags or {}).items()],
        )
        known.metrics.update({m[0]: m[1] for m in metrics})
        known.params.update(params or {})
        known.tags.update(tags or {})

    def retag(self, trial: int, front: bool, rank: int | None) -> bool:
        """A trial entered or left the front; False where there is no run, or it says so already."""
        known = self.runs.get(trial)
        tag = "true" if front else "false"
        if known is None or known.tags.get("pareto") == tag:
            return False
        metrics = [] if rank is None else [("pareto_rank", float(rank), int(1e3 * time.time()), 0)]
        self._log(known, metrics, tags={"pareto": tag})
        return True

    def on_front(self) -> set[int]:
        """Trials whose run says that they are on the front."""
        return {t for t, r in self.runs.items() if t is not None and r.tags.get("pareto") == "true"}

    def steps(self) -> set[int]:
        """The steps at which the server has a hypervolume."""
        assert self.parent is not None
        history = self.client.get_metric_history(self.parent.run_id, "hypervolume")
        return {m.step for m in history}

    def log_curve(self, points: Sequence[CurvePoint]) -> None:
        assert self.parent is not None
        for at in range(0, len(points), LARGEST_BATCH):
            some = points[at : at + LARGEST_BATCH]
            self._log(self.parent, [("hypervolume", p.value, p.when_ms, p.step) for p in some])

    def put_artifacts(
        self, files: Mapping[str, Path], table: Sequence[Mapping[str, Any]], content: str
    ) -> bool:
        """Files by their artifact name, and the front as `front.json`; False if they are there.

        content: a hash of all of them.
        """
        parent = self.parent
        assert parent is not None
        there = self._files(parent.run_id)
        wanted = set(files) | ({"front.json"} if table else set())
        if parent.tags.get(CONTENT) == content and wanted <= there:
            return False
        for name, path in files.items():
            self._artifact(parent.run_id, name, path)
        if table:
            self._table(parent.run_id, table, "front.json" in there)
        self._log(parent, [], tags={CONTENT: content})
        return True

    def _files(self, run_id: str) -> set[str]:
        """What is there, also in folders, of which an artifact's name may have one."""
        found = self.client.list_artifacts(run_id)
        return {f.path for f in found if not f.is_dir} | {
            f.path for d in found if d.is_dir for f in self.client.list_artifacts(run_id, d.path)
        }

    def _artifact(self, run_id: str, name: str, path: Path) -> None:
        folder, _, own = name.rpartition("/")
        if path.name == own:
            self.client.log_artifact(run_id, str(path), folder or None)
            return
        with tempfile.TemporaryDirectory(prefix="vitpareto-mlflow-") as scratch:
            copied = shutil.copy(path, Path(scratch) / own)
            self.client.log_artifact(run_id, str(copied), folder or None)

    def _table(self, run_id: str, table: Sequence[Mapping[str, Any]], again: bool) -> None:
        import pandas as pd

        # object, as log_table looks for columns of that type and pandas warns where it finds others
        frame = pd.DataFrame([dict(row) for row in table], dtype=object)
        if again:  # log_table would append to the one that is there
            text = frame.to_json(orient="split", index=False, date_format="iso")
            self.client.log_text(run_id, text, "front.json")
        else:
            self.client.log_table(run_id, frame, "front.json")

    def close(self, keep: Collection[int | None]) -> int:
        """End the runs left RUNNING by a driver that died, apart from these; their number."""
        stale = [r for t, r in self.runs.items() if r.status == "RUNNING" and t not in keep]
        for known in stale:
            self.client.set_terminated(known.run_id, "KILLED")
            known.status = "KILLED"
        return len(stale)

    def remove(self, keep: Collection[int | None]) -> int:
        """Delete the runs of trials that the study has not (MLflow can restore them)."""
        extra = [t for t in self.runs if t not in keep]
        for trial in extra:
            self.client.delete_run(self.runs.pop(trial).run_id)
        return len(extra)
