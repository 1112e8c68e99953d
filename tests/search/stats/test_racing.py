"""Racing's promise, by simulation; and that a rule which breaks it is found out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from tests.refusals import refused
from tests.search.races import front_of, race_study, simulated
from vitpareto.methods.engine.errors import Code
from vitpareto.search.stats.racing import DEFAULT, RULES, Incumbent, Lost, Race, refuted, rungs

ERROR = 0.05


def test_looks_rise_to_the_last_image() -> None:
    assert rungs(400) == (32, 42, 54, 70, 91, 119, 154, 201, 261, 339, 400)
    assert rungs(20) == (20,)
    assert rungs(100_000)[0] == 1563
    for images in (33, 50, 1000, 2000):
        looked = rungs(images)
        assert looked[-1] == images and (np.diff(looked) > 0).all()


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
@pytest.mark.parametrize("objectives", [2, 3])
def test_a_study_loses_of_its_front_no_more_often_than_promised(rule, objectives: int) -> None:
    """Nearly tied candidates, where wrong stops are likeliest; with the one-sided 99.9 % limit on
    how many of these studies may lose anything if the promise holds.
    """
    studies = 60
    draw = np.random.default_rng(3)
    lost = images = whole = 0
    for _ in range(studies):
        one = race_study(*simulated(draw, 20, 256, objectives, 0.02), rule, ERROR)
        lost, images, whole = lost + bool(one.lost), images + one.images, whole + one.whole
    assert lost <= binom.ppf(0.999, studies, ERROR)
    assert images <= whole


def test_a_rule_that_spends_its_error_again_and_again_is_found_out() -> None:
    studies = 60
    draw = np.random.default_rng(3)
    lost = sum(
        bool(race_study(*simulated(draw, 20, 256, 2, 0.02), DEFAULT, ERROR, spend=False).lost)
        for _ in range(studies)
    )
    assert lost > binom.ppf(0.999, studies, ERROR)


def test_racing_saves_where_accuracies_lie_apart() -> None:
    draw = np.random.default_rng(5)
    one = race_study(*simulated(draw, 60, 1000, 2, 0.6), DEFAULT, ERROR)
    assert one.stopped and not one.lost
    assert one.images < 0.75 * one.whole


def test_the_front_is_that_of_a_study_without_racing() -> None:
    draw = np.random.default_rng(6)
    right, costs = simulated(draw, 60, 800, 2, 0.4)
    one = race_study(right, costs, DEFAULT, ERROR)
    kept = np.setdiff1d(np.arange(60), one.stopped)
    assert list(kept[front_of(right[kept], costs[kept])]) == front_of(right, costs)


@pytest.mark.parametrize("rule", RULES.values(), ids=str)
def test_a_tie_is_behind_once_every_image_was_seen_and_a_better_one_never(rule) -> None:
    """A candidate that is right as often, at no lower cost, brings the front nothing."""
    other = np.arange(200) < 150
    same = np.roll(other, 3)
    assert refuted(rule, same, other, other, 0.01, 5)
    better = other | (np.arange(200) == 160)
    assert not refuted(rule, better, other, other, 0.5, 1)


def test_who_is_compared_with_whom() -> None:
    images = 300
    draw = np.random.default_rng(0)
    right = draw.random(images) < 0.9
    poor = right & (draw.random(images) < 0.6)
    race = Race(images, ERROR, 10)
    cheap = Incumbent(1, right, (2.0, 5.0))
    # one that is dearer in any cost stops nobody
    assert race.look(7, poor[:200], (1.9, 9.0), [cheap], right) is None
    assert race.look(7, poor[:200], (2.0, 4.9), [cheap], right) is None
    assert race.look(1, poor[:200], (2.0, 5.0), [cheap], right) is None, "nobody races himself"
    lost = race.look(7, poor[:200], (2.0, 5.0), [cheap, Incumbent(2, poor, (1.0, 1.0))], right)
    assert isinstance(lost, Lost) and (lost.by, lost.images) == (1, 200)
    truth = 100 * poor.mean()
    assert lost.estimate.low <= truth <= lost.estimate.high


def test_the_error_of_all_trials_is_that_of_the_study() -> None:
    race = Race(100, ERROR, 50)
    assert sum(race.allowed(t) for t in range(50)) == pytest.approx(0.9 * ERROR)
    # a longer study: blocks that double, each with half of what the one before had
    assert sum(race.allowed(t) for t in range(50, 5000)) < 0.1 * ERROR
    assert race.allowed(0) == race.allowed(49) > race.allowed(50) > race.allowed(100) > 0
    # those that are behind leave their part to the others of their block
    for trial in range(40):
        race.behind(trial)
        race.behind(trial)
    assert sum(race.allowed(t) for t in range(40, 50)) == pytest.approx(0.9 * ERROR)
    assert race.allowed(60) == pytest.approx(Race(100, ERROR, 50).allowed(0) / 18)
    endless = Race(100, ERROR, None)
    assert sum(endless.allowed(t) for t in range(3000)) < ERROR
    with refused(Code.OUT_OF_RANGE, name="error", got=0):
        Race(100, 0, 5)
