"""Racing: its error by simulation, and a rule that exceeds it as a check of the simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tests.refusals import refused
from tests.search.races import front_of, race_study, simulated
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.stats.racing import (
    DEFAULT,
    RULES,
    Dominated,
    Incumbent,
    Race,
    is_no_better,
    rungs,
)

ERROR = 0.05


def test_looks_increase_to_the_last_image() -> None:
    assert rungs(400) == (32, 42, 54, 70, 91, 119, 154, 201, 261, 339, 400)
    assert rungs(20) == (20,)
    assert rungs(100_000)[0] == 1563
    for images in (33, 50, 1000, 2000):
        looks = rungs(images)
        assert looks[-1] == images and (np.diff(looks) > 0).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize("objectives", [2, 3])
def test_probability_of_losing_a_front_member_is_at_most_the_error(rule, objectives: int) -> None:
    """Candidates are nearly tied, where wrong stops are most likely. The limit is the one-sided
    99.9 % quantile of the number of studies that lose a member if the probability is the error.
    """
    studies = 60
    draw = np.random.default_rng(3)
    lost = images = whole = 0
    for _ in range(studies):
        raced = race_study(*simulated(draw, 20, 256, objectives, 0.02), rule, ERROR)
        lost, images, whole = lost + bool(raced.lost), images + raced.images, whole + raced.whole
    assert lost <= binom.ppf(0.999, studies, ERROR)
    assert images <= whole


def test_rule_that_uses_the_whole_error_at_every_look_exceeds_it() -> None:
    studies = 60
    draw = np.random.default_rng(3)
    lost = sum(
        bool(race_study(*simulated(draw, 20, 256, 2, 0.02), DEFAULT, ERROR, spend=False).lost)
        for _ in range(studies)
    )
    assert lost > binom.ppf(0.999, studies, ERROR)


def test_racing_saves_images_if_accuracies_differ() -> None:
    draw = np.random.default_rng(5)
    raced = race_study(*simulated(draw, 60, 1000, 2, 0.6), DEFAULT, ERROR)
    assert raced.stopped and not raced.lost
    assert raced.images < 0.75 * raced.whole


def test_front_equals_that_of_a_study_without_racing() -> None:
    draw = np.random.default_rng(6)
    right, costs = simulated(draw, 60, 800, 2, 0.4)
    raced = race_study(right, costs, DEFAULT, ERROR)
    remaining = np.setdiff1d(np.arange(60), raced.stopped)
    assert list(remaining[front_of(right[remaining], costs[remaining])]) == front_of(right, costs)


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_tie_is_rejected_once_all_images_are_seen_and_a_better_trial_is_not(rule) -> None:
    """A candidate with the same accuracy and no lower cost does not improve the front."""
    other = np.arange(200) < 150
    same = np.roll(other, 3)
    assert is_no_better(rule, same, other, other, 0.01, 5)
    better = other | (np.arange(200) == 160)
    assert not is_no_better(rule, better, other, other, 0.5, 1)


def test_trial_is_compared_with_the_best_incumbent_of_no_higher_cost() -> None:
    images = 300
    draw = np.random.default_rng(0)
    right = draw.random(images) < 0.9
    poor = right & (draw.random(images) < 0.6)
    race = Race(images, ERROR, 10)
    cheap = Incumbent(1, right, (2.0, 5.0))
    # an incumbent that is worse in any cost does not stop the trial
    assert race.check(7, poor[:200], (1.9, 9.0), [cheap], right) is None
    assert race.check(7, poor[:200], (2.0, 4.9), [cheap], right) is None
    assert race.check(1, poor[:200], (2.0, 5.0), [cheap], right) is None, (
        "a trial is not compared with itself"
    )
    decision = race.check(7, poor[:200], (2.0, 5.0), [cheap, Incumbent(2, poor, (1.0, 1.0))], right)
    assert isinstance(decision, Dominated) and (decision.by, decision.images) == (1, 200)
    truth = 100 * poor.mean()
    assert decision.estimate.low <= truth <= decision.estimate.high


def test_errors_of_all_trials_sum_to_at_most_that_of_the_study() -> None:
    race = Race(100, ERROR, 50)
    assert sum(race.error_of(t) for t in range(50)) == pytest.approx(0.9 * ERROR)
    # additional trials: the block size doubles and the block's error halves
    assert sum(race.error_of(t) for t in range(50, 5000)) < 0.1 * ERROR
    assert race.error_of(0) == race.error_of(49) > race.error_of(50) > race.error_of(100) > 0
    # dominated trials release their error to the others of their block
    for trial in range(40):
        race.mark_dominated(trial)
        race.mark_dominated(trial)
    assert sum(race.error_of(t) for t in range(40, 50)) == pytest.approx(0.9 * ERROR)
    assert race.error_of(60) == pytest.approx(Race(100, ERROR, 50).error_of(0) / 18)
    endless = Race(100, ERROR, None)
    assert sum(endless.error_of(t) for t in range(3000)) < ERROR
    with refused(Code.OUT_OF_RANGE, name="error", got=0):
        Race(100, 0, 5)
