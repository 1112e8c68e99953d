"""The verdict: the trials and images that it compares, its interval, and its sentence."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
from scipy.stats import beta, norm

from vitpareto.search.stats.intervals import paired_difference
from vitpareto.search.study.certificates import attach
from vitpareto.search.study.certification_record import ERROR, CertificationRecord
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.verdict import controls_of, is_control, verdict

OBJECTIVES = ("top1", "gmacs")
#: error probability of the bounds on simulated rates
BOUND_ERROR = 0.01
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
    recipe = RecordedRecipe.from_json(RECIPES[method])
    return TrialResult(
        number, "finished", recipe, f"k{number}", values, recipe, len(right), pack_bits(right),
    )  # fmt: skip


def bits(right: int, images: int = 400) -> np.ndarray:
    return np.arange(images) < right


def certified(results: list[TrialResult], held: dict[int, np.ndarray]) -> list[TrialResult]:
    images = len(next(iter(held.values())))
    record = CertificationRecord("f", ("a",), np.zeros(images, dtype=np.int64), (tuple(held),))
    held_out = [replace(r, bits=pack_bits(held[r.trial]), images=images) for r in results
             if r.trial in held]  # fmt: skip
    return attach(results, record, held_out, held_out[0])


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


def test_gain_is_measured_on_held_out_images() -> None:
    held = {0: bits(390), 1: bits(370), 3: bits(340)}
    found = verdict(certified(STUDY, held), OBJECTIVES)
    assert found is not None and found.method is not None and found.control is not None
    assert (found.method.trial, found.control.trial, found.budget) == (1, 3, 2.0)
    low, high = paired_difference(30, 0, 400, ERROR)
    assert found.gain == 7.5 and found.held_out and found.images == 400
    assert found.margin == max(7.5 - low, high - 7.5) and found.significant
    assert re.fullmatch(
        r"At 2 GMACs \(the cost of the front's knee\) pruning gains 7\.50 ± [23]\.\d\d points of "
        r"top-1 over the best of 3 controls, resize size=48 \(trial 3, 2 GMACs\): trial 1, topk "
        r"keep_rate=0\.5 prune_layers=\[3,6,9\]; 95 %, paired, on 400 held-out images",
        str(found),
    )
    assert "\n" not in str(found)


def test_search_images_are_used_if_one_of_the_two_is_not_certified() -> None:
    for results in (STUDY, certified(STUDY, {0: bits(390), 1: bits(370)})):
        found = verdict(results, OBJECTIVES)
        assert found is not None and not found.held_out and found.gain == 100 * 50 / 400
        assert str(found).endswith(
            "not certified: on the 400 search images that selected both, which favours the method"
        )


def test_without_a_gain_the_control_is_recommended() -> None:
    results = [
        trial(0, "dense", bits(390), 4.0), trial(1, "topk", bits(370), 2.0),
        trial(2, "resize", bits(360), 2.0), trial(3, "tome", bits(352), 1.0),
    ]  # fmt: skip
    worse = verdict(certified(results, {0: bits(390), 1: bits(340), 2: bits(360)}), OBJECTIVES)
    assert str(worse).startswith(
        "At 2 GMACs (the cost of the front's knee) no method is better than the only control: use "
        "the smaller input, resize size=48 (trial 2, 2 GMACs); the best method, trial 1, topk"
    )
    assert "is 5.00 ± " in str(worse) and " points below it; 95 %" in str(worse)
    level = verdict(certified(results, {0: bits(390), 1: bits(360), 2: bits(360)}), OBJECTIVES)
    assert level is not None and level.gain == 0 and not level.significant
    assert ", has the same top-1, ± " in str(level)
    close = verdict(certified(results, {0: bits(390), 1: bits(361), 2: bits(360)}), OBJECTIVES)
    assert close is not None and close.gain == 0.25 and not close.significant
    assert "no method is significantly better than the only control: use" in str(close)
    assert "is 0.25 ± " in str(close) and " points above it" in str(close)


def test_dense_model_is_a_control_if_it_is_within_the_budget() -> None:
    found = verdict(STUDY, OBJECTIVES, max_gmacs=10)
    assert found is not None and found.method is not None and found.control is not None
    assert (found.method.trial, found.control.trial, found.controls) == (6, 0, 4)
    assert not found.significant and "use the dense model (trial 0, 4 GMACs)" in str(found)


def test_only_finished_trials_within_the_budget_are_compared() -> None:
    found = verdict(STUDY, OBJECTIVES, max_gmacs=1.99)
    assert found is not None and found.method is not None and found.control is not None
    assert (found.method.trial, found.control.trial) == (4, 2)
    found = verdict(STUDY, OBJECTIVES, max_gmacs=0.9)
    assert found is not None and found.method is None
    assert found.reason.startswith("no verdict is possible: no fully measured method")
    assert found.reason.endswith("tome r=4 inflection=0 prop_attn=True, costs 1 GMACs")
    assert str(found) == f"At 0.9 GMACs (as requested) {found.reason}"


def test_reason_names_what_is_missing() -> None:
    assert verdict([], OBJECTIVES) is None
    assert verdict(STUDY[:1], OBJECTIVES) is None
    few = [STUDY[0], STUDY[1]]
    found = verdict(few, OBJECTIVES)
    assert found is not None and found.method is not None and found.control is None
    assert "control is within the budget; the cheapest, dense" in found.reason
    found = verdict([STUDY[0], STUDY[3]], OBJECTIVES)
    assert found is not None and found.method is None and found.control is None
    assert found.reason == "no method is fully measured"
    without_bits = [replace(r, bits="", images=0) for r in STUDY]
    found = verdict(without_bits, OBJECTIVES)
    assert found is not None and found.method is None and found.control is None
    assert "correctness per image" in found.reason


def test_without_a_knee_the_budget_is_the_cost_of_the_middle_of_the_front() -> None:
    results = [
        trial(0, "dense", bits(390), 4.0), trial(1, "topk", bits(380), 2.0),
        trial(2, "random", bits(100), 1.0),
    ]  # fmt: skip
    found = verdict(results, OBJECTIVES)
    assert found is not None and found.budget == 2.0
    assert found.budget_source == "the cost of the middle of the front, which has no knee"


def test_budget_is_in_the_first_cost_of_the_objectives() -> None:
    results = [replace(r, values={**r.values, "latency_ms": 3 * r.values["gmacs"]}) for r in STUDY]
    found = verdict(results, ("top1", "latency_ms"))
    assert found is not None and found.cost.name == "latency_ms" and found.budget == 6.0
    assert str(found).startswith("At 6 ms latency per batch, p50 (the cost of the front's knee)")
    assert "At 2 GMACs" in str(verdict(results, ("top1", "latency_ms"), max_gmacs=2))


def test_controls_are_those_of_the_registry() -> None:
    assert [r.trial for r in controls_of(STUDY)] == [0, 2, 3, 5]
    assert not is_control(trial(9, "both", bits(1), 1.0))
    assert not is_control(
        replace(STUDY[1], recipe=RecordedRecipe.from_json({"tokens": {"method": "unknown"}}))
    )


def test_interval_covers_on_held_out_images_and_not_on_search_images() -> None:
    """The search images select both among 60 methods and a control of the same accuracy."""
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
        for study, on_held_out in ((certified(results, held), True), (results, False)):
            found = verdict(study, OBJECTIVES, max_gmacs=3)
            assert found is not None and found.images == images and found.held_out == on_held_out
            if on_held_out:
                missed += abs(found.gain) > found.margin  # the true gain is 0
                claims += found.significant
            else:
                naive += abs(found.gain) > found.margin
    assert beta.isf(BOUND_ERROR, missed + 1, studies - missed) <= ERROR, missed
    assert claims <= missed, "every significant gain is a miss here"
    assert beta.ppf(BOUND_ERROR, naive, studies - naive + 1) > ERROR, naive
