"""The verdict of a study, in one sentence: what pruning gains at a budget, or what to use instead.

The best method is compared with the best control within the budget. The search images select the
budget (the front's knee), the method and the control; the held-out images, which are independent of
this selection, give the difference. It is a single comparison, selected beforehand, so its interval
needs no correction for multiple comparisons. If one of the two is not certified, the search images
are used, and the sentence says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitpareto import methods
from vitpareto.methods import BadInput, Recipe
from vitpareto.search.stats.intervals import paired_difference
from vitpareto.search.study.certificates import ERROR, flips
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES, Objective, objectives_named
from vitpareto.search.study.results import TrialResult, unpack_bits


def only_controls(recipe: Mapping[str, Any]) -> bool:
    """Return whether all steps of a recipe (`Recipe.to_dict`) are controls; true for dense."""
    steps = (recipe.get(part) for part in ("structure", "tokens"))
    try:
        return all(methods.get(step["method"]).control for step in steps if step)
    except BadInput:  # a method of another version; controls of all versions are known
        return False


def is_control(result: TrialResult) -> bool:
    """Return `only_controls` of a trial's recipe."""
    return only_controls(result.recipe)


def controls_of(results: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the finished controls."""
    return [r for r in results if r.state == "finished" and is_control(r)]


@dataclass(frozen=True)
class Verdict:
    """The comparison of the best method with the best control within a budget.

    Attributes:
        cost, budget: the cost and its upper bound, in the cost's unit.
        budget_is: where the budget comes from.
        method, control: the best of each; None if none is within the budget.
        gain, margin: paired difference in points of top-1; within `margin` of the truth with 95 %.
        images: number of images of the comparison.
        held_out: whether these are held-out images.
        rivals: number of controls within the budget.
        otherwise: why there is no gain; else "".
    """

    cost: Objective
    budget: float
    budget_is: str
    method: TrialResult | None
    control: TrialResult | None
    gain: float = 0.0
    margin: float = 0.0
    images: int = 0
    held_out: bool = False
    rivals: int = 0
    otherwise: str = ""

    @property
    def shown(self) -> bool:
        """Whether the gain is above 0 after rounding for print."""
        return bool(self.images) and _rounded(self.gain) > _outwards(self.margin)

    def __str__(self) -> str:
        at = f"At {_amount(self.cost, self.budget)} ({self.budget_is})"
        method, control = self.method, self.control
        if method is None or control is None:
            return f"{at} {self.otherwise}"
        gain, margin = _rounded(self.gain), f"± {_outwards(self.margin):.2f} points"
        best = f"trial {method.trial}, {recipe_line(method)}"
        named = "the dense model" if control.is_reference else recipe_line(control)
        rival = f"{named} (trial {control.trial}, {_cost(self.cost, control)})"
        field = f"the best of {self.rivals} controls" if self.rivals > 1 else "the only control"
        how = f"95 %, paired, on {self.images} held-out images"
        if not self.held_out:
            how = (
                f"95 %, paired, on the {self.images} search images that chose both, which flatters "
                "the method: not certified"
            )
        if self.shown:
            return (
                f"{at} pruning gains {gain:.2f} {margin} of top-1 over {field}, {rival}: "
                f"{best}; {how}"
            )
        what = f"level with it, {margin}"
        if gain:
            what = f"{abs(gain):.2f} {margin} {'above' if gain > 0 else 'below'} it"
        beats = "is shown to beat" if gain > 0 else "beats"
        return (
            f"{at} no method {beats} {field}: use {_kind(control)}{rival}; the best method, "
            f"{best}, is {what}; {how}"
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
    rivals = controls_of(finished)
    others = [r for r in finished if not is_control(r)]
    chosen = _budget(finished, objectives, max_gmacs)
    if chosen is None:
        return None
    cost, budget, where = chosen
    if not others:
        return Verdict(cost, budget, where, None, None, otherwise="no method was measured in full")
    method, control = (_best(some, cost, budget) for some in (others, rivals))
    if method is None or control is None:
        lacking = "method" if method is None else "control"
        said = f"there is no verdict: no {lacking} that was measured in full costs so little"
        if (nearest := _cheapest(others if method is None else rivals, cost)) is not None:
            said += f"; the cheapest, {recipe_line(nearest)}, costs {_cost(cost, nearest)}"
        return Verdict(cost, budget, where, method, control, otherwise=said)
    field = sum(_loss(cost, r) <= cost.sign * budget for r in rivals)
    return _compared(Verdict(cost, budget, where, method, control, rivals=field))


def _budget(
    finished: Sequence[TrialResult], objectives: Sequence[str], max_gmacs: float | None
) -> tuple[Objective, float, str] | None:
    if max_gmacs is not None and finished:
        return OBJECTIVES["gmacs"], max_gmacs, "as asked for"
    axes = objectives_named(objectives)
    cost = next(o for o in axes if o.name not in ACCURACIES)
    front = front_of(finished, axes)
    knee = knee_of(front, axes, reference_of(finished))
    if knee is not None:
        return cost, knee.values[cost.name], "the knee's cost"
    pruned = [r for r in front if not r.is_reference]
    pruned = [r for r in pruned if not is_control(r)] or pruned
    if pruned:
        pruned.sort(key=lambda r: _loss(cost, r))
        middle = pruned[(len(pruned) - 1) // 2]
        return cost, middle.values[cost.name], "the middle of the front, which has no knee"
    dense = reference_of(finished)
    if dense is None or len(finished) == 1:
        return None
    return cost, dense.values[cost.name], "the dense model's cost"


def _best(results: Sequence[TrialResult], cost: Objective, budget: float) -> TrialResult | None:
    """Return the most accurate result within the budget, of equal ones the cheapest."""
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


def _compared(asked: Verdict) -> Verdict:
    """Add the difference of the two trials, on held-out images if both are certified."""
    method, control = asked.method, asked.control
    assert method is not None and control is not None
    held_out = method.certified is not None and control.certified is not None
    pair = [(r.certified if held_out else r) for r in (method, control)]
    one, other = (unpack_bits(r.bits, r.images) for r in pair if r is not None)
    images = len(one)
    if not images or images != len(other):
        said = "there is no verdict: its images were not kept"
        return replace(asked, method=None, control=None, otherwise=said)
    lost, gained = flips(one, other)
    gain = 100 * (gained - lost) / images
    low, high = paired_difference(gained, lost, images, ERROR)
    # symmetric, so that "gain ± margin" contains the exact interval
    margin = max(gain - low, high - gain)
    return replace(asked, gain=gain, margin=margin, images=images, held_out=held_out)


def _rounded(points: float) -> float:
    return round(points, 2) + 0.0  # no minus zero


def _outwards(points: float) -> float:
    return math.ceil(round(100 * points, 6)) / 100


def _amount(cost: Objective, value: float) -> str:
    return f"{value:.4g} GMACs" if cost.name == "gmacs" else f"{value:.4g} {cost.unit} {cost.label}"


def _cost(cost: Objective, result: TrialResult) -> str:
    return _amount(cost, result.values[cost.name])


def _kind(control: TrialResult) -> str:
    """Return what kind of control it is, for the sentence."""
    structure = control.recipe.get("structure")
    if not structure:
        return ""
    resizes = methods.get(structure["method"]).resizes_input
    return "the smaller input, " if resizes else "the smaller model, "


def recipe_line(result: TrialResult) -> str:
    """Return a trial's recipe in one line."""
    try:
        return str(Recipe.from_dict(result.recipe))
    except BadInput:  # written by a version with other methods
        return result.method
