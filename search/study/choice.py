"""The choice of the trial to deploy under a budget.

Reads `TrialResult`s. It may not measure, read or write anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vitpareto.search.errors import Code, UserError
from vitpareto.search.study.front import values_of
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.results import TrialResult

#: Trials that a message names when none is within the budget.
NEAREST = 3


class NothingUnderBudget(UserError, LookupError):
    """No finished trial is within the budget.

    `details` hold the `budget` by objective, the number of `finished` trials, the `nearest` trials'
    numbers, and how many trials are `uncertified` or `untimed` and so could not be considered.
    """


@dataclass(frozen=True)
class _Budget:
    """The bounds by objective, and whether `top1` bounds the certified interval's lower end."""

    bounds: dict[str, float]
    certified: bool

    def value(self, result: TrialResult, name: str) -> float:
        """Return what the bound on `name` is compared with; NaN if it was not measured."""
        if name == "top1" and self.certified:
            return math.nan if result.certified is None else result.certified.low
        return result.values.get(name, math.nan)

    def applies(self, result: TrialResult) -> bool:
        """Whether every bounded value of the result was measured."""
        return all(math.isfinite(self.value(result, name)) for name in self.bounds)

    def excess(self, result: TrialResult) -> float:
        """Return how far the result is outside, each bound relative to itself; 0 if within."""
        return sum(
            max(0.0, OBJECTIVES[name].sign * (self.value(result, name) - bound))
            / (abs(bound) or 1.0)
            for name, bound in self.bounds.items()
        )


def choose(
    results: Iterable[TrialResult],
    *,
    max_gmacs: float | None = None,
    max_latency_ms: float | None = None,
    min_top1: float | None = None,
) -> TrialResult:
    """Return the finished trial to deploy under a budget.

    Without `min_top1`: the best top-1 within the budgets, ties to the lower cost. With it: the
    cheapest trial that reaches it within the other budgets, ties to the better top-1. The cost is
    gmacs, or the latency if that is the only budget. All bounds are inclusive; remaining ties go
    to the lower trial number. A trial without a measured latency is outside any latency budget.

    If any trial is certified, `min_top1` is compared with the lower end of the certified interval,
    and only certified trials are considered: these intervals hold for all certified trials at once,
    so that the guarantee survives the choice. Otherwise it is compared with top-1 on the search
    images, which is optimistic.

    Args:
        results: the study's results; only finished ones are considered.
        max_gmacs: GMACs per image.
        max_latency_ms: milliseconds per batch.
        min_top1: top-1 accuracy in percent.

    Raises:
        UserError: no budget, a non-finite one, or a finished trial without top1 or gmacs.
        NothingUnderBudget: no trial is within the budget.
    """
    bounds = _checked_bounds(gmacs=max_gmacs, latency_ms=max_latency_ms, top1=min_top1)
    finished = [r for r in results if r.state == "finished"]
    for result in finished:
        values_of(result.values, (OBJECTIVES["top1"], OBJECTIVES["gmacs"]), f"trial {result.trial}")
    certified = min_top1 is not None and any(r.certified is not None for r in finished)
    budget = _Budget(bounds, certified)
    measured = [r for r in finished if budget.applies(r)]
    within = [r for r in measured if budget.excess(r) == 0]
    if not within:
        raise _nothing(budget, finished, measured)
    cost = "latency_ms" if max_latency_ms is not None and max_gmacs is None else "gmacs"
    if min_top1 is not None:
        return min(within, key=lambda r: (r.values[cost], -r.values["top1"], r.trial))
    return min(within, key=lambda r: (-r.values["top1"], r.values[cost], r.trial))


def _checked_bounds(**requested: float | None) -> dict[str, float]:
    """Return the budgets that are given, by objective. Raises UserError."""
    bounds = {name: float(bound) for name, bound in requested.items() if bound is not None}
    if not bounds:
        raise UserError(
            "one of max_gmacs, max_latency_ms and min_top1 must be given (got none)", Code.MISSING
        )
    for name, bound in bounds.items():
        if not math.isfinite(bound):
            raise UserError(
                f"the budget for {name} must be finite (got {bound})",
                Code.OUT_OF_RANGE, name=name, got=bound,
            )  # fmt: skip
    return bounds


def _nothing(
    budget: _Budget, finished: Sequence[TrialResult], measured: Sequence[TrialResult]
) -> NothingUnderBudget:
    bounds = " and ".join(
        f"{'certified top1' if budget.certified and name == 'top1' else name} "
        f"{'<=' if OBJECTIVES[name].sign > 0 else '>='} {bound:g} {OBJECTIVES[name].unit}"
        for name, bound in budget.bounds.items()
    )
    nearest = sorted(measured, key=lambda r: (budget.excess(r), r.trial))[:NEAREST]
    uncertified = sum(budget.certified and r.certified is None for r in finished)
    untimed = sum(
        "latency_ms" in budget.bounds and not math.isfinite(budget.value(r, "latency_ms"))
        for r in finished
    )
    parts = [f"none of {len(finished)} finished trials has {bounds}"]
    if nearest:
        parts.append("nearest: " + "; ".join(_described(r, budget) for r in nearest))
    if uncertified:
        parts.append(f"{uncertified} are not certified")
    if untimed:
        parts.append(f"{untimed} have no latency_ms")
    return NothingUnderBudget(
        "; ".join(parts),
        Code.EMPTY,
        budget=budget.bounds,
        finished=len(finished),
        nearest=[r.trial for r in nearest],
        uncertified=uncertified,
        untimed=untimed,
    )


def _described(result: TrialResult, budget: _Budget) -> str:
    """Return the trial's number, method and the values that a budget may bound."""
    names = ["top1", "gmacs", *(["latency_ms"] if "latency_ms" in budget.bounds else [])]
    texts = [f"{name} {_amount(name, result.values[name])}" for name in names]
    if budget.certified and result.certified is not None:
        held_out = result.certified
        texts[0] = (
            f"certified top1 at least {_amount('top1', held_out.low)} "
            f"({_amount('top1', held_out.top1)} of {held_out.images} held-out images)"
        )
    return f"trial {result.trial} ({result.method}): {', '.join(texts)}"


def _amount(name: str, value: float) -> str:
    return f"{value:.4g} {OBJECTIVES[name].unit}"
