"""Confidence sequences and estimates, over all orders of a few images or many random orders."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.stats.confidence_sequences import (
    BLOCK,
    control_variate,
    cost_floor,
    log_capital,
)


@pytest.mark.parametrize("losses", [0, 2, 3])
@pytest.mark.parametrize("reference_right", [3, 6])
def test_mean_capital_is_at_most_one_if_the_hypothesis_is_true(
    losses: int, reference_right: int
) -> None:
    """At every image the mean capital over all 720 orders is at most 1, so the capital ever exceeds
    1/a with probability a at most.
    """
    images = 6
    reference = np.arange(images) < reference_right
    candidate = reference.copy()
    candidate[:losses] = False
    if reference_right < images:
        candidate[-1] = True
    wanted, best = int(candidate.sum()), np.zeros(math.factorial(images))
    capital = np.zeros((images + 1, len(best)))
    for i, order in enumerate(itertools.permutations(range(images))):
        at = np.array(order)
        for n in range(images + 1):
            capital[n, i] = math.exp(log_capital(candidate[at][:n], reference[at], wanted))
    assert (capital.mean(axis=1) <= 1 + 1e-9).all()
    for a in (0.5, 0.2):
        assert (capital.max(axis=0) >= 1 / a).mean() <= a


def test_false_hypothesis_is_rejected() -> None:
    draw = np.random.default_rng(0)
    reference = draw.random(1000) < 0.8
    candidate = reference & (draw.random(1000) < 0.9)
    assert log_capital(candidate[:600], reference, int(reference.sum())) > math.log(1e3)
    # a hypothesis that has become impossible
    assert math.isinf(log_capital(np.zeros(300, dtype=bool), reference, 701))


def test_cost_floor_is_below_the_mean_at_all_looks_simultaneously() -> None:
    images, error, orders = 160, 0.1, 400
    draw = np.random.default_rng(1)
    costs = draw.uniform(2, 6, images) ** 1.5
    bounds, mean = (costs.min() - 1, costs.max() + 1), costs.mean()
    missed, ends = 0, []
    for _ in range(orders):
        shuffled = draw.permutation(costs)
        floors = [
            cost_floor(shuffled[:n], bounds, images, error) for n in range(BLOCK, images, 4 * BLOCK)
        ]
        missed += max(floors) > mean * (1 + 1e-12)
        ends.append(floors[-1])
    assert missed <= binom.ppf(0.999, orders, error)
    assert np.mean(ends) > 0.9 * mean, "the floor is close to the mean"
    assert cost_floor(costs, bounds, images, error) == pytest.approx(mean)
    with refused(Code.OUT_OF_RANGE, name="costs"):
        cost_floor(costs, (costs.min() + 1, bounds[1]), images, error)


def test_estimate_is_the_dense_accuracy_plus_the_mean_difference() -> None:
    dense = np.array([1, 1, 1, 0, 1, 0, 1, 1], dtype=bool)
    candidate = np.array([1, 0, 1, 1], dtype=bool)
    estimate = control_variate(candidate, dense)
    assert estimate.value == 75 + 100 * (1 - 1) / 4
    assert estimate.low <= estimate.value <= estimate.high
    # within the accuracies that are still possible
    assert estimate.low >= 100 * 3 / 8 and estimate.high <= 100 * 7 / 8
    whole = control_variate(dense ^ True, dense)
    assert (whole.low, whole.value, whole.high) == (25, 25, 25)
    with refused(Code.EMPTY, name="candidate"):
        control_variate(candidate[:0], dense)


def test_estimate_is_unbiased_and_its_interval_has_its_coverage() -> None:
    draw = np.random.default_rng(2)
    images, seen, studies = 400, 60, 2000
    dense = draw.random(images) < 0.8
    candidate = np.where(draw.random(images) < 0.12, ~dense, dense)
    truth, found, covered = 100 * candidate.mean(), [], 0
    for _ in range(studies):
        at = draw.permutation(images)
        estimate = control_variate(candidate[at][:seen], dense[at])
        found.append(estimate.value)
        covered += estimate.low <= truth <= estimate.high
    error = np.std(found) / math.sqrt(studies)
    assert abs(np.mean(found) - truth) < 4 * error
    # the interval of 95 % is approximate
    assert covered >= binom.ppf(0.001, studies, 0.94)
    plain = math.sqrt(truth * (100 - truth) / seen * (images - seen) / (images - 1))
    assert np.std(found) < 0.9 * plain, "the control variate reduces the variance"
