"""The one sentence: which two are compared, on which images, and that it is as sure as it says."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from scipy.stats import beta, norm

from vitpareto.search.stats.intervals import paired_difference
from vitpareto.search.study.certificates import ERROR, Record, attach
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.verdict import controls_of, is_control, verdict

OBJECTIVES = ("top1", "gmacs")
#: chance that a bound on a simulated share is wrong
SURE = 0.01
RECIPES = {
    "dense": {},
    "topk": {"tokens": {"method": "topk", "keep_rate": 0.5, "prune_layers": [3, 6, 9]}},
    "tome": {"tokens": {"method": "tome", "r": 4}},
    "random": {"tokens": {"method": "random", "keep_rate": 0.5, "prune_layers": [3, 6, 9]}},
    "resize": {"structure": {"method": "resize", "size": 48}},
    "both": {
        "structure": {"method": "resize", "size": 48},
        "tokens": {"method": "topk", "keep_rate": 0.5, "prune_layers": [3]},
    },
}


def trial(number: int, method: str, right: np.ndarray, gmacs: float, **more: float) -> TrialResult:
    values = {"top1": 100 * float(right.mean()), "gmacs": gmacs, "params_m": 1.0, **more}
    return TrialResult(
        number, "finished", RECIPES[method], f"k{number}", values, RECIPES[method], len(right),
        pack_bits(right),
    )  # fmt: skip


def bits(right: int, images: int = 400) -> np.ndarray:
    return np.arange(images) < right


def certified(results: list[TrialResult], held: dict[int, np.ndarray]) -> list[TrialResult]:
    images = len(next(iter(held.values())))
    record = Record("f", ("a",), np.zeros(images, dtype=np.int64), (tuple(held),))
    there = [replace(r, bits=pack_bits(held[r.trial]), images=images) for r in results
             if r.trial in held]  # fmt: skip
    return attach(results, record, there, there[0])


STUDY = [
    trial(0, "dense", bits(390), 4.0),
    trial(1, "topk", bits(380), 2.0),
    trial(2, "random", bits(300), 1.9),
    trial(3, "resize", bits(330), 2.0),
    trial(4, "tome", bits(352), 1.0),
    trial(5, "random", bits(150), 1.0),
    trial(6, "tome", bits(385), 3.9),
    replace(trial(7, "tome", bits(400), 0.5), state="raced_out"),
]


def test_a_gain_names_both_with_their_interval_on_held_out_images() -> None:
    # what the knee is
    held = {0: bits(390), 1: bits(370), 3: bits(340)}
    said = verdict(certified(STUDY, held), OBJECTIVES)
    assert said is not None and said.method is not None and said.control is not None
    assert (said.method.trial, said.control.trial, said.budget) == (1, 3, 2.0)
    low, high = paired_difference(30, 0, 400, ERROR)
    assert said.gain == 7.5 and said.held_out and said.images == 400
    assert said.margin == max(7.5 - low, high - 7.5) and said.shown
    assert re.fullmatch(
        r"At 2 GMACs \(the knee's cost\) pruning gains 7\.50 ± [23]\.\d\d points of top-1 over the "
        r"best of 3 controls, resize size=48 \(trial 3, 2 GMACs\): trial 1, topk keep_rate=0\.5 "
        r"prune_layers=\[3,6,9\]; 95 %, paired, on 400 held-out images",
        str(said),
    )
    assert "\n" not in str(said)


def test_without_certificates_of_both_the_search_images_have_to_do_and_it_says_so() -> None:
    for results in (STUDY, certified(STUDY, {0: bits(390), 1: bits(370)})):
        said = verdict(results, OBJECTIVES)
        assert said is not None and not said.held_out and said.gain == 100 * 50 / 400
        assert str(said).endswith(
            "on the 400 search images that chose both, which flatters the method: not certified"
        )


def test_no_gain_says_what_to_use_instead() -> None:
    results = [
        trial(0, "dense", bits(390), 4.0), trial(1, "topk", bits(370), 2.0),
        trial(2, "resize", bits(360), 2.0), trial(3, "tome", bits(352), 1.0),
    ]  # fmt: skip
    worse = verdict(certified(results, {0: bits(390), 1: bits(340), 2: bits(360)}), OBJECTIVES)
    assert str(worse).startswith(
        "At 2 GMACs (the knee's cost) no method beats the only control: use the smaller input, "
        "resize size=48 (trial 2, 2 GMACs); the best method, trial 1, topk"
    )
    assert "is 5.00 ± " in str(worse) and " points below it; 95 %" in str(worse)
    level = verdict(certified(results, {0: bits(390), 1: bits(360), 2: bits(360)}), OBJECTIVES)
    assert "no method beats the only control" in str(level) and "is level with it, ± " in str(level)
    unsure = verdict(certified(results, {0: bits(390), 1: bits(361), 2: bits(360)}), OBJECTIVES)
    assert unsure is not None and unsure.gain == 0.25 and not unsure.shown
    assert "no method is shown to beat the only control: use the smaller input" in str(unsure)
    assert "is 0.25 ± " in str(unsure) and " points above it" in str(unsure)


def test_at_the_dense_models_cost_the_dense_model_is_a_control() -> None:
    said = str(verdict(STUDY, OBJECTIVES, max_gmacs=10))
    assert said.startswith(
        "At 10 GMACs (as asked for) no method beats the best of 4 controls: use the dense model "
        "(trial 0, 4 GMACs); the best method, trial 6, tome"
    )


def test_the_budget_is_a_bound_and_what_was_stopped_early_is_no_method() -> None:
    said = verdict(STUDY, OBJECTIVES, max_gmacs=1.99)
    assert said is not None and said.method is not None and said.control is not None
    assert (said.method.trial, said.control.trial) == (4, 2)
    said = verdict(STUDY, OBJECTIVES, max_gmacs=0.9)
    assert said is not None and said.method is None
    assert str(said) == (
        "At 0.9 GMACs (as asked for) there is no verdict: no method that was measured in full "
        "costs so little; the cheapest, tome r=4 inflection=0 prop_attn=True, costs 1 GMACs"
    )


def test_what_is_missing_is_said() -> None:
    assert verdict([], OBJECTIVES) is None
    assert verdict(STUDY[:1], OBJECTIVES) is None
    few = [STUDY[0], STUDY[1]]
    assert "no control that was measured in full costs so little; the cheapest, dense" in str(
        verdict(few, OBJECTIVES)
    )
    assert str(verdict([STUDY[0], STUDY[3]], OBJECTIVES)).endswith("no method was measured in full")
    bare = [replace(r, bits="", images=0) for r in STUDY]
    assert "its images were not kept" in str(verdict(bare, OBJECTIVES))


def test_without_a_knee_the_budget_is_the_middle_of_the_methods_on_the_front() -> None:
    results = [
        trial(0, "dense", bits(390), 4.0), trial(1, "topk", bits(380), 2.0),
        trial(2, "random", bits(100), 1.0),
    ]  # fmt: skip
    said = verdict(results, OBJECTIVES)
    assert said is not None and said.budget == 2.0
    assert "(the middle of the front, which has no knee)" in str(said)


def test_the_budget_is_in_the_first_cost_of_the_study() -> None:
    results = [replace(r, values={**r.values, "latency_ms": 3 * r.values["gmacs"]}) for r in STUDY]
    said = verdict(results, ("top1", "latency_ms"))
    assert said is not None and said.cost.name == "latency_ms" and said.budget == 6.0
    assert str(said).startswith("At 6 ms latency per batch, p50 (the knee's cost)")
    assert "At 2 GMACs" in str(verdict(results, ("top1", "latency_ms"), max_gmacs=2))


def test_controls_are_what_the_registry_says() -> None:
    assert [r.trial for r in controls_of(STUDY)] == [0, 2, 3, 5]
    assert not is_control(trial(9, "both", bits(1), 1.0))
    assert not is_control(replace(STUDY[1], recipe={"tokens": {"method": "of another version"}}))


def test_the_certified_gain_is_as_sure_as_it_says_where_that_of_the_search_is_not() -> None:
    """Both are chosen on the search images: 60 equal methods, a control as good as they are."""
    draw, studies, missed, naive, claims = np.random.default_rng(0), 400, 0, 0, 0
    images, level = 250, np.float32(norm.ppf(0.8))
    for _ in range(studies):
        hard = draw.standard_normal(2 * images, dtype=np.float32)
        noise = draw.standard_normal((62, 2 * images), dtype=np.float32)
        right = level + np.float32(0.7**0.5) * hard + np.float32(0.3**0.5) * noise > 0
        names = ["dense", *["tome"] * 60, "random"]
        results = [
            trial(i, name, right[i, :images], 9.0 if name == "dense" else 2.0)
            for i, name in enumerate(names)
        ]
        held = {i: right[i, images:] for i in range(62)}
        for found, sure in ((certified(results, held), True), (results, False)):
            said = verdict(found, OBJECTIVES, max_gmacs=3)
            assert said is not None and said.images == images and said.held_out == sure
            if sure:
                missed += abs(said.gain) > said.margin  # the truth is 0
                claims += said.shown
            else:
                naive += abs(said.gain) > said.margin
    assert beta.isf(SURE, missed + 1, studies - missed) <= ERROR, missed
    assert claims <= missed, "a claim is a miss here"
    assert beta.ppf(SURE, naive, studies - naive + 1) > ERROR, naive
