"""The verdict of a study, in one sentence: what pruning gains at a budget, or what to use instead.

The best method is compared with the best control within the budget. The search images select the
budget (the front's knee), the method and the control; the held-out images, which are independent of
this selection, give the difference. It is a single comparison, selected beforehand, so its interval
needs no correction for multiple comparisons. If one of the two is not certified, the search images
are used, and the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitpareto import methods
from vitpareto.search.stats.intervals import paired_difference
from vitpareto.search.study.certificates import flips
from vitpareto.search.study.certification_record import ERROR
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES, Objective, objectives_named
from vitpareto.search.study.results import TrialResult, unpack_bits


def is_control(result: TrialResult) -> bool:
    """Return whether all steps of a trial's recipe are controls; true for the dense model."""
    return result.recipe.only_controls


def controls_of(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the finished controls."""
    return [r for r in results if r.state == "finished" and is_control(r)]


@dataclass(frozen=True)
class Verdict:
    """The comparison of the best method with the best control within a budget.

    Attributes:
        cost, budget: the cost and its upper bound, in the cost's unit.
        budget_source: where the budget comes from.
        method, control: the best of each; None if none is within the budget.
        gain, margin: paired difference in points of top-1; within `margin` of the truth with 95 %.
        images: number of images of the comparison.
        held_out: whether these are held-out images.
        controls: number of controls within the budget.
        reason: why nothing could be compared; else "".
    """

    cost: Objective
    budget: float
    budget_source: str
    method: TrialResult | None
    control: TrialResult | None
    gain: float = 0.0
    margin: float = 0.0
    images: int = 0
    held_out: bool = False
    controls: int = 0
    reason: str = ""

    @property
    def significant(self) -> bool:
        """Whether the gain is significant: above its margin after rounding for print."""
        return bool(self.images) and _rounded(self.gain) > _rounded_up(self.margin)

    def __str__(self) -> str:
        budget = f"At {_amount(self.cost, self.budget)} ({self.budget_source})"
        method, control = self.method, self.control
        if method is None or control is None:
            return f"{budget} {self.reason}"
        gain, margin = _rounded(self.gain), f"± {_rounded_up(self.margin):.2f} points"
        best = f"trial {method.trial}, {method.recipe}"
        name = "the dense model" if control.is_reference else str(control.recipe)
        opponent = f"{name} (trial {control.trial}, {_cost(self.cost, control)})"
        rank = f"the best of {self.controls} controls" if self.controls > 1 else "the only control"
        basis = f"95 %, paired, on {self.images} held-out images"
        if not self.held_out:
            basis = (
                f"95 %, paired, not certified: on the {self.images} search images that selected "
                "both, which favours the method"
            )
        if self.significant:
            return (
                f"{budget} pruning gains {gain:.2f} {margin} of top-1 over {rank}, {opponent}: "
                f"{best}; {basis}"
            )
        difference = f"has the same top-1, {margin}"
        if gain:
            difference = f"is {abs(gain):.2f} {margin} {'above' if gain > 0 else 'below'} it"
        better = "significantly better" if gain > 0 else "better"
        return (
            f"{budget} no method is {better} than {rank}: use {_kind(control)}{opponent}; the "
            f"best method, {best}, {difference}; {basis}"
        )


def verdict(
    results: Sequence[TrialResult], objectives: Sequence[str], max_gmacs: float | None = None
) -> Verdict | None:
    """Return the verdict at a budget; None until a trial besides dense is fully measured.

    Args:
        results: the study's.
        objectives: names of the study's objectives.
        max_gmacs: the budget; None uses the cost of the front's knee, or of its middle member if it
            has no knee. The interval assumes that the budget does not depend on the results.
    """
    finished = [r for r in results if r.state == "finished"]
    controls = controls_of(finished)
    pruned = [r for r in finished if not is_control(r)]
    found = _budget(finished, objectives, max_gmacs)
    if found is None:
        return None
    cost, budget, source = found
    if not pruned:
        return Verdict(cost, budget, source, None, None, reason="no method is fully measured")
    method, control = (_best(candidates, cost, budget) for candidates in (pruned, controls))
    if method is None or control is None:
        missing, candidates = ("method", pruned) if method is None else ("control", controls)
        reason = f"no verdict is possible: no fully measured {missing} is within the budget"
        if (nearest := _cheapest(candidates, cost)) is not None:
            reason += f"; the cheapest, {nearest.recipe}, costs {_cost(cost, nearest)}"
        return Verdict(cost, budget, source, method, control, reason=reason)
    within = sum(_loss(cost, r) <= cost.sign * budget for r in controls)
    return _compared(Verdict(cost, budget, source, method, control, controls=within))


def _budget(
    finished: Sequence[TrialResult], objectives: Sequence[str], max_gmacs: float | None
) -> tuple[Objective, float, str] | None:
    if max_gmacs is not None and finished:
        return OBJECTIVES["gmacs"], max_gmacs, "as requested"
    axes = objectives_named(objectives)
    cost = next(o for o in axes if o.name not in ACCURACIES)
    front = front_of(finished, axes)
    knee = knee_of(front, axes, reference_of(finished))
    if knee is not None:
        return cost, knee.values[cost.name], "the cost of the front's knee"
    pruned = [r for r in front if not r.is_reference]
    pruned = [r for r in pruned if not is_control(r)] or pruned
    if pruned:
        pruned.sort(key=lambda r: _loss(cost, r))
        middle = pruned[(len(pruned) - 1) // 2]
        return (
            cost,
            middle.values[cost.name],
            "the cost of the middle of the front, which has no knee",
        )
    dense = reference_of(finished)
    if dense is None or len(finished) == 1:
        return None
    return cost, dense.values[cost.name], "the cost of the dense model"


def _best(results: Sequence[TrialResult], cost: Objective, budget: float) -> TrialResult | None:
    """Return the most accurate result within the budget; ties go to the lower cost."""
    return min(
        (r for r in results if _loss(cost, r) <= cost.sign * budget),
        key=lambda r: (-r.values["top1"], _loss(cost, r), r.trial),
        default=None,
    )


def _cheapest(results: Sequence[TrialResult], cost: Objective) -> TrialResult | None:
    known = (r for r in results if math.isfinite(_loss(cost, r)))
    return min(known, key=lambda r: (_loss(cost, r), r.trial), default=None)


def _loss(cost: Objective, result: TrialResult) -> float:
    return cost.sign * result.values.get(cost.name, math.inf * cost.sign)


def _compared(verdict: Verdict) -> Verdict:
    """Add the difference of the two trials, on held-out images if both are certified."""
    method, control = verdict.method, verdict.control
    assert method is not None and control is not None
    held_out = method.certified is not None and control.certified is not None
    pair = [(r.certified if held_out else r) for r in (method, control)]
    right, control_right = (unpack_bits(r.bits, r.images) for r in pair if r is not None)
    images = len(right)
    if not images or images != len(control_right):
        reason = "no verdict is possible: the correctness per image is not stored"
        return replace(verdict, method=None, control=None, reason=reason)
    lost, gained = flips(right, control_right)
    gain = 100 * (gained - lost) / images
    low, high = paired_difference(gained, lost, images, ERROR)
    # symmetric, so that "gain ± margin" contains the exact interval
    margin = max(gain - low, high - gain)
    return replace(verdict, gain=gain, margin=margin, images=images, held_out=held_out)


def _rounded(points: float) -> float:
    return round(points, 2) + 0.0  # never -0.0


def _rounded_up(points: float) -> float:
    return math.ceil(round(100 * points, 6)) / 100


def _amount(cost: Objective, value: float) -> str:
    return f"{value:.4g} GMACs" if cost.name == "gmacs" else f"{value:.4g} {cost.unit} {cost.label}"


def _cost(cost: Objective, result: TrialResult) -> str:
    return _amount(cost, result.values[cost.name])


def _kind(control: TrialResult) -> str:
    """Return what kind of control it is, for the sentence."""
    structure = control.recipe.structure
    if structure is None:
        return ""
    resizes = methods.get(structure.method).resizes_input
    return "the smaller input, " if resizes else "the smaller model, "
