"""Which trial of a study is exported: by budget, the knee of the front, or by number."""

from __future__ import annotations

from collections.abc import Sequence

from vitpareto.methods import Code
from vitpareto.search.errors import UserError
from vitpareto.search.study.choice import choose
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import Objective, objectives_named
from vitpareto.search.study.results import TrialResult


def choose_trial(
    results: Sequence[TrialResult],
    objectives: Sequence[Objective],
    *,
    max_gmacs: float | None = None,
    max_latency_ms: float | None = None,
    min_top1: float | None = None,
    knee: bool = False,
    trial: int | None = None,
) -> TrialResult:
    """Choose a finished trial by budgets, as the knee of the front, or by its number.

    Raises:
        UserError: none or several kinds of choice are given, no trial is within the budgets, the
            front has no knee, or the trial does not exist or is not finished.
    """
    budgets = {
        "max_gmacs": max_gmacs, "max_latency_ms": max_latency_ms, "min_top1": min_top1,
    }  # fmt: skip
    by_budget = any(v is not None for v in budgets.values())
    if [by_budget, knee, trial is not None].count(True) != 1:
        raise UserError(
            "a trial must be chosen in exactly one way: budgets (--max-gmacs, --max-latency-ms, "
            "--min-top1), --knee, or --trial N",
            Code.CONFLICT if by_budget or knee else Code.MISSING,
        )
    finished = [r for r in results if r.state == "finished"]
    if not finished:
        raise UserError(
            f"none of {len(results)} trials is finished: there is nothing to export",
            Code.EMPTY,
            trials=len(results),
        )
    if trial is not None:
        return _by_number(results, finished, trial)
    if knee:
        return _knee(finished, objectives)
    return choose(finished, **budgets)


def knee_trial(results: Sequence[TrialResult], objectives: Sequence[str]) -> TrialResult | None:
    """The knee of the front of these results; None if it has none."""
    axes = objectives_named(objectives)
    return knee_of(front_of(results, axes), axes, reference_of(results))


def _knee(finished: Sequence[TrialResult], objectives: Sequence[Objective]) -> TrialResult:
    found = knee_trial(finished, [o.name for o in objectives])
    if found is None:
        front = front_of(finished, objectives)
        raise UserError(
            f"the front has no knee (an end of the front is never one): {_listed(front)}; "
            "give --max-gmacs or --trial N",
            Code.EMPTY,
            front=tuple(r.trial for r in front),
        )
    return found


def _by_number(
    results: Sequence[TrialResult], finished: Sequence[TrialResult], trial: int
) -> TrialResult:
    result = next((r for r in results if r.trial == trial), None)
    if result is None:
        nearest = sorted(finished, key=lambda r: abs(r.trial - trial))[:3]
        raise UserError(
            f"trial {trial} does not exist; nearest: {_listed(nearest)}",
            Code.NOT_FOUND,
            trial=trial,
            nearest=tuple(r.trial for r in nearest),
        )
    if result.state != "finished":
        raise UserError(
            f"trial {trial} must be finished to be exported (got {result.state}"
            f"{f': {result.reason}' if result.reason else ''})",
            Code.UNSUPPORTED,
            trial=trial,
            state=result.state,
        )
    return result


def _listed(results: Sequence[TrialResult]) -> str:
    return "; ".join(
        f"trial {r.trial} ({r.method}): top1 {r.values['top1']:.4g} %, "
        f"gmacs {r.values['gmacs']:.4g} G"
        for r in results[:3]
    )
