"""Proposals that start from the front: half of them, near it, inside their bounds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import optuna
import pytest

from search.samplers import NEAR, STEPS, NearFront, make_sampler

MEMBER = {"method": "a", "rate": 0.75, "blocks": 6, "scale": 1e-3}


def study_of(seed: int, front: bool = True) -> optuna.Study:
    member = optuna.create_study(directions=["maximize", "minimize"])
    member.enqueue_trial(MEMBER)
    member.tell(ask(member), [1.0, 1.0])
    known = member.trials if front else []
    sampler = make_sampler("front", seed, lambda: known)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def ask(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    if trial.suggest_categorical("method", ["a", "b"]) == "a":
        trial.suggest_float("rate", 0.25, 0.95)
        trial.suggest_int("blocks", 1, 11)
        trial.suggest_float("scale", 1e-5, 1e-1, log=True)
    else:
        trial.suggest_float("other", 0.0, 1.0)
    return trial


def test_half_of_the_proposals_are_a_member_with_its_numbers_moved() -> None:
    study, near, far = study_of(0), [], 0
    sampler = study.sampler
    assert isinstance(sampler, NearFront)
    for i in range(400):
        trial = ask(study)
        if sampler.start:
            near.append(trial.params)
        else:
            far += 1
        study.tell(trial, [float(i % 7), float(i % 5)])
    # 400 tosses of a fair coin: within 4.5 of its standard deviations
    assert NEAR == 50 and abs(len(near) - 200) < 45 and far == 400 - len(near)
    kinds = Counter(p["method"] for p in near)
    assert kinds["a"] > 0.8 * len(near) and kinds["b"] > 0
    rates = np.array([p["rate"] for p in near if p["method"] == "a"])
    assert rates.min() >= 0.25 and rates.max() <= 0.95 and len(set(rates)) > 0.6 * len(rates)
    # a step is normal, its scale drawn evenly on a log scale between STEPS of the range
    assert np.median(abs(rates - 0.75)) < 0.67 * STEPS[1] * 0.7
    blocks = [p["blocks"] for p in near if p["method"] == "a"]
    assert set(blocks) <= set(range(1, 12)) and len(set(blocks)) > 5
    scales = np.log10([p["scale"] for p in near if p["method"] == "a"])
    assert scales.min() >= -5 and scales.max() <= -1 and abs(np.median(scales) + 3) < 0.5


def test_without_a_front_it_is_tpe() -> None:
    alone, tpe = study_of(3, front=False), optuna.create_study(
        directions=["maximize", "minimize"], sampler=make_sampler("tpe", 3)
    )  # fmt: skip
    for i in range(30):
        one, other = ask(alone), ask(tpe)
        assert one.params == other.params
        for study, trial in ((alone, one), (tpe, other)):
            study.tell(trial, [float(i % 7), float(i % 5)])


def test_a_member_of_another_space_is_not_proposed_outside_this_one() -> None:
    """A job's narrowing may leave out where a member lies."""
    study = study_of(1)
    sampler = study.sampler
    assert isinstance(sampler, NearFront)
    for i in range(60):
        trial = study.ask()
        assert 0.8 <= trial.suggest_float("rate", 0.8, 0.9) <= 0.9
        assert trial.suggest_categorical("method", ["b", "c"]) in ("b", "c")
        study.tell(trial, [float(i), float(i)])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_proposes_the_same(seed: int) -> None:
    def drawn() -> list[dict]:
        study, seen = study_of(seed), []
        for i in range(20):
            trial = ask(study)
            seen.append(trial.params)
            study.tell(trial, [float(i % 7), float(i % 5)])
        return seen

    assert drawn() == drawn()
