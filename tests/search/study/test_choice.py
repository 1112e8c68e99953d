"""The choice of a trial under a budget."""

from __future__ import annotations

import pytest

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.study.choice import NothingUnderBudget, choose
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import TrialResult, TrialState


def trial(
    number: int,
    top1: float,
    gmacs: float,
    state: TrialState = "finished",
    method: str = "tome",
    **more: float,
) -> TrialResult:
    tokens = None if method == "dense" else RecordedStep(method, {"r": number})
    recipe = RecordedRecipe(tokens=tokens)
    values = {"top1": top1, "gmacs": gmacs, **more}
    return TrialResult(number, state, recipe, key=f"key{number}", values=values)


CANDIDATES = [
    trial(0, 80.0, 4.6, method="dense", latency_ms=10.0),
    trial(1, 78.0, 3.0, latency_ms=8.0),
    trial(2, 78.0, 2.9, latency_ms=9.0),
    trial(3, 70.0, 2.0),
    trial(4, 99.0, 0.1, state="raced_out", latency_ms=0.1),
]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"max_gmacs": 3.5}, 2),  # a tie in accuracy: the lower cost
        ({"max_gmacs": 2.9}, 2),  # bounds are inclusive
        ({"max_gmacs": 100}, 0),
        ({"max_latency_ms": 9.0}, 1),  # the tie is broken by latency, the only budget
        ({"max_latency_ms": 9.0, "max_gmacs": 4}, 2),
        ({"max_latency_ms": 8.5, "max_gmacs": 3.5}, 1),
        ({"min_top1": 78.0}, 2),
        ({"min_top1": 60}, 3),
        ({"min_top1": 78.0, "max_latency_ms": 9.5}, 1),
        ({"min_top1": 75, "max_gmacs": 4, "max_latency_ms": 8}, 1),
    ],
)
def test_choose(budget, expected):
    assert choose(CANDIDATES, **budget).trial == expected
    assert choose(CANDIDATES[::-1], **budget).trial == expected


@pytest.mark.parametrize(
    ("budget", "nearest", "untimed"),
    [
        ({"gmacs": 1.5}, [3, 2, 1], 0),
        ({"top1": 81.0}, [0, 1, 2], 0),
        ({"latency_ms": 1.0, "top1": 50.0}, [1, 2, 0], 1),
    ],
)
def test_nothing_under_budget_holds_the_budget_and_the_nearest(budget, nearest, untimed):
    arguments = {"gmacs": "max_gmacs", "latency_ms": "max_latency_ms", "top1": "min_top1"}
    details = {"budget": budget, "nearest": nearest, "finished": 4, "untimed": untimed}
    with refused(Code.EMPTY, NothingUnderBudget, uncertified=0, **details) as caught:
        choose(CANDIDATES, **{arguments[name]: bound for name, bound in budget.items()})
    assert isinstance(caught.value, LookupError)


def test_choose_checks_its_input():
    with refused(Code.EMPTY, NothingUnderBudget, finished=0, nearest=[]):
        choose([], max_gmacs=1)
    with refused(Code.MISSING):
        choose(CANDIDATES)
    with refused(Code.OUT_OF_RANGE, name="gmacs"):
        choose(CANDIDATES, max_gmacs=float("nan"))
    with refused(Code.MISSING, owner="trial 7", name="gmacs"):
        choose([TrialResult(7, "finished", RecordedRecipe(), "k", {"top1": 1.0})], max_gmacs=1)
