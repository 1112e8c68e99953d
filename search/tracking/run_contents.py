"""What the MLflow runs of a study's trials contain, as pure functions of results.

Calls no server and reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from vitpareto.search.stats.pareto import rank
from vitpareto.search.study.front import Front, front_of, reference_point
from vitpareto.search.study.objectives import ACCURACIES, objectives_named
from vitpareto.search.study.results import Certified, TrialResult

#: MLflow's limits, in characters
MAX_TAG_CHARS, MAX_PARAM_CHARS, MAX_NAME_CHARS = 8000, 6000, 250
#: tags that identify a run: its study, and its trial (none for the run of the study itself)
STUDY_ID_TAG, TRIAL_TAG = "vitpareto.study_id", "trial"
#: prefix of the metrics on held-out images
CERTIFIED_PREFIX = "certified_"


@dataclass(frozen=True)
class RunSpec:
    """The desired contents of one run. Times are in ms since 1970.

    `trial` is None for the run of the study itself. `status` is one of MLflow's run states.
    """

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
    """The hypervolume after `step` results of a study; `when_ms` is in ms since 1970."""

    step: int
    hypervolume: float
    when_ms: int


@dataclass(frozen=True)
class FrontPosition:
    """A trial relative to the front: whether it is a member, and its non-domination rank.

    `rank` is None if the trial was not fully measured.
    """

    on_front: bool
    rank: int | None


def experiment_name(study: str) -> str:
    """The experiment of a study. The prefix separates it from other projects on the server."""
    return f"vitpareto/{study}"


def ranks_of(results: Iterable[TrialResult], objectives: Sequence[str]) -> dict[int, int]:
    """Non-domination rank of every finished trial: 0 for the members of the front.

    Of trials with equal objectives only the first is on the front; the others have rank 1.
    """
    axes = objectives_named(objectives)
    finished = [r for r in results if r.state == "finished"]
    if not finished:
        return {}
    points = [[r.values[o.name] for o in axes] for r in finished]
    ranks = rank(points, [o.sign for o in axes])
    front = {r.trial for r in front_of(finished, axes)}
    return {
        r.trial: 0 if r.trial in front else max(1, int(n))
        for r, n in zip(finished, ranks, strict=True)
    }


def trial_runs(
    results: Sequence[TrialResult],
    *,
    study: str,
    objectives: Sequence[str],
    recovered: Sequence[TrialResult] = (),
) -> list[RunSpec]:
    """The runs of all trials.

    Args:
        results: all results of the study.
        study: its name.
        objectives: names of its objectives.
        recovered: results of the trials that were fine-tuned after the search.
    """
    ranks, recovered_ranks = ranks_of(results, objectives), ranks_of(recovered, objectives)
    recovered_by_trial = {r.trial: r for r in recovered}
    return [
        trial_run(
            r,
            study=study,
            position=FrontPosition(ranks.get(r.trial) == 0, ranks.get(r.trial)),
            recovered=recovered_by_trial.get(r.trial),
            recovered_on_front=recovered_ranks.get(r.trial) == 0,
        )
        for r in results
    ]


def trial_run(
    result: TrialResult,
    *,
    study: str,
    position: FrontPosition,
    recovered: TrialResult | None = None,
    recovered_on_front: bool = False,
) -> RunSpec:
    """The run of one trial.

    A trial that was stopped early has `top1_estimate` instead of `top1`, so that sorting by `top1`
    compares measurements only. A failed trial has the status FAILED and the tag `reason`.
    """
    metrics, tags = _metrics(result, position), _tags(result, study, position)
    if recovered is not None:
        tags["recovered"] = recovered.state
        tags["recovered_pareto"] = "true" if recovered_on_front else "false"
        metrics |= {
            f"recovered_{name}": recovered.values[name]
            for name in ACCURACIES
            if name in recovered.values
        }
        metrics |= _certified_metrics(recovered.certified, f"{CERTIFIED_PREFIX}recovered_")
    return RunSpec(
        trial=result.trial,
        name=f"{result.trial} {result.recipe}"[:MAX_NAME_CHARS],
        status="FAILED" if result.state == "failed" else "FINISHED",
        params=_params(result),
        metrics=metrics,
        tags=tags,
        begin_ms=result.begun_ms,
        end_ms=result.ended_ms,
    )


def _metrics(result: TrialResult, position: FrontPosition) -> dict[str, float]:
    if result.state == "finished":
        metrics = _finite(result.values) | _certified_metrics(result.certified, CERTIFIED_PREFIX)
        if position.rank is not None:
            metrics["pareto_rank"] = float(position.rank)
        return metrics
    if result.state == "raced_out":
        costs = _finite({k: v for k, v in result.values.items() if k not in ACCURACIES})
        return costs | {
            "top1_estimate": result.values["top1"],
            "images_seen": float(result.images),
        }
    return {}


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if math.isfinite(v)}


def _certified_metrics(certified: Certified | None, prefix: str) -> dict[str, float]:
    """Metrics on held-out images; none if the trial is not certified."""
    if certified is None:
        return {}
    metrics = {
        "top1": certified.top1,
        "top1_low": certified.low,
        "top1_high": certified.high,
        "images": certified.images,
        "change": certified.change,
        "change_low": certified.change_low,
        "change_high": certified.change_high,
    }
    if certified.worst is not None:
        metrics |= {
            "lost": certified.lost,
            "gained": certified.gained,
            "worst_class_drop": certified.worst.drop,
        }
    return {f"{prefix}{k}": float(v) for k, v in metrics.items() if v is not None}


def _params(result: TrialResult) -> dict[str, str]:
    """The parameters of the recipe. Those of the structural step are prefixed by `structure.`."""
    params = {"method": result.method}
    structure, tokens = result.recipe.structure, result.recipe.tokens
    below = {} if structure is None else structure.to_json()
    steps = {f"structure.{name}": value for name, value in below.items()}
    steps |= {} if tokens is None else tokens.params
    params |= {name: _cut(str(value), MAX_PARAM_CHARS) for name, value in steps.items()}
    return params


def _tags(result: TrialResult, study: str, position: FrontPosition) -> dict[str, str]:
    recipe = yaml.safe_dump(
        result.recipe.to_json(), sort_keys=False, default_flow_style=None, width=100
    )
    tags = {
        "method": result.method,
        "pareto": "true" if position.on_front else "false",
        TRIAL_TAG: str(result.trial),
        "study": study,
        "state": result.state,
        "recipe": _cut(recipe, MAX_TAG_CHARS),
    }
    if result.reason:
        tags["reason"] = _cut(result.reason, MAX_TAG_CHARS)
    if weights := result.rebuilt_from.weights:
        tags["weights"] = weights
    if result.certified is not None and result.certified.worst is not None:
        worst = result.certified.worst
        noise = "" if worst.beyond_noise else "; within noise"
        tags["worst_class"] = f"{worst.name} ({worst.drop:.1f} points of {worst.images}{noise})"
    return tags


def hypervolume_curve(
    results: Iterable[TrialResult], objectives: Sequence[str]
) -> list[CurvePoint]:
    """The hypervolume after each result, in the order in which trials ended.

    It is 0 until the dense model, which defines the reference point, is measured.
    """
    axes = objectives_named(objectives)
    names = {o.name for o in axes}
    before_dense: list[TrialResult] = []
    front: Front | None = None
    curve = []
    for step, result in enumerate(sorted(results, key=lambda r: (r.ended_ms, r.trial)), 1):
        if result.state == "finished":
            before_dense.append(result)
            if front is None and result.is_reference:
                dense = {k: v for k, v in result.values.items() if k in names}
                front = Front(axes, reference_point(dense, axes))
            if front is not None:
                for finished in before_dense:
                    front.add(finished.trial, finished.values)
                before_dense.clear()
        volume = front.hypervolume() if front is not None else 0.0
        curve.append(CurvePoint(step, volume, result.ended_ms))
    return curve


def fit_note(note: str) -> str:
    """Markdown that fits into a tag: cut at the end of a line if it is too long."""
    return _cut(note, MAX_TAG_CHARS, "\n\n… truncated; the artifacts have the complete text.")


def _cut(text: str, max_chars: int, mark: str = " …") -> str:
    if len(text) <= max_chars:
        return text
    start = text[: max_chars - len(mark)]
    return (start[: start.rfind("\n")] if "\n" in mark and "\n" in start else start) + mark
