"""Racing in a study: who is stopped, what becomes of it on disk, in Optuna and in the next run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.methods import Recipe
from vitpareto.search.stats.racing import Race, rungs
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits, unpack_bits
from vitpareto.search.study.rungs import RungReport
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.trials.early_stopping import EarlyStopping
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

IMAGES = 240
AXES = [OBJECTIVES["top1"], OBJECTIVES["gmacs"]]
TOPK, RANDOM = Recipe.of("topk", keep_rate=0.5), Recipe.of("random", keep_rate=0.5)
ATS = Recipe.from_yaml("tokens: {method: ats, prune_layers: [3], max_tokens: 40}")


def bits(share: float, seed: int = 0) -> np.ndarray:
    """[IMAGES]: so large a part is right."""
    return np.random.default_rng(seed).permutation(IMAGES) < share * IMAGES


def result(
    trial: int, recipe: Recipe, right: np.ndarray, gmacs: float, state: Any = "finished"
) -> TrialResult:
    values = {"top1": 100 * float(right.mean()), "gmacs": gmacs, "params_m": 1.0}
    plain = RecordedRecipe.of(recipe)
    return TrialResult(
        trial, state, plain, f"k{trial}", values, plain, len(right), pack_bits(right), 0.0, 100.0
    )


def rung(right: np.ndarray, gmacs: float | None, **more: Any) -> RungReport:
    values = {"top1": 100 * float(right.mean()), "params_m": 1.0}
    if gmacs is not None:
        values["gmacs"] = gmacs
    return RungReport("key", RecordedRecipe.of(TOPK), values, right, **more)


def early_stopping() -> EarlyStopping:
    """The dense model at 2 GMACs, and a good method at 1."""
    found = EarlyStopping(Race(IMAGES, 0.05, 20), AXES, Provenance(seed=0))
    found.on_result(result(0, Recipe(), bits(0.95), 2.0))
    found.on_result(result(1, TOPK, bits(0.9, 1), 1.0))
    return found


def test_confidently_worse_trial_is_stopped() -> None:
    right = bits(0.4, 2)[:90]
    stopped = early_stopping().on_rung(
        7, TOPK, rung(right, 1.2, seconds=3.0, provenance=Provenance(batch=8))
    )
    assert stopped is not None
    assert (stopped.state, stopped.trial, stopped.images) == ("raced_out", 7, 90)
    assert stopped.reason == "behind trial 1 after 90 of 240 images"
    assert (unpack_bits(stopped.bits, 90) == right).all()
    assert stopped.values["gmacs"] == 1.2 and stopped.seconds == 3.0
    assert stopped.top1_low <= stopped.values["top1"] <= stopped.top1_high  # type: ignore[operator]
    assert stopped.provenance == Provenance(seed=0, batch=8)


def test_cheapest_trial_is_not_stopped() -> None:
    assert early_stopping().on_rung(7, TOPK, rung(bits(0.4, 2)[:90], 0.9)) is None


def test_dense_model_is_not_stopped_and_is_required() -> None:
    early = EarlyStopping(Race(IMAGES, 0.05, 20), AXES, Provenance())
    assert early.on_rung(7, TOPK, rung(bits(0.1)[:200], 9.0)) is None
    assert early_stopping().on_rung(0, Recipe(), rung(bits(0.1)[:200], 9.0)) is None


def test_controls_are_compared_with_controls_only() -> None:
    """The front of the controls shows what pruning gains, so methods do not stop controls."""
    poor = rung(bits(0.4, 2)[:150], 1.2)
    found = early_stopping()
    assert found.on_rung(7, RANDOM, poor) is None
    assert found.on_rung(7, TOPK, poor) is not None
    found.on_result(result(2, RANDOM, bits(0.8, 3), 1.1))
    stopped = found.on_rung(8, RANDOM, poor)
    assert stopped is not None and stopped.reason.startswith("behind trial 2 ")
    assert RecordedRecipe.of(RANDOM).only_controls and not RecordedRecipe.of(TOPK).only_controls


def test_adaptive_cost_is_compared_by_its_lower_bound() -> None:
    """ATS: its first images cost 1.2 GMACs each, and the rest may be cheaper."""
    poor, costs = bits(0.4, 2)[:90], np.full(90, 1.2e9)
    adaptive = rung(poor, 1.2, macs_each=costs, bounds=(0.2e9, 2e9))
    assert early_stopping().on_rung(7, ATS, adaptive) is None, (
        "the lower bound from a third of the images is below 1 GMAC"
    )
    costly = rung(poor, 1.2, macs_each=costs, bounds=(1.1e9, 2e9))
    stopped = early_stopping().on_rung(7, ATS, costly)
    assert stopped is not None and stopped.values["gmacs"] == 1.2


def test_trial_is_stopped_only_if_it_is_worse_in_all_objectives() -> None:
    axes = [*AXES, OBJECTIVES["params_m"]]
    found = EarlyStopping(Race(IMAGES, 0.05, 20), axes, Provenance())
    found.on_result(result(0, Recipe(), bits(0.95), 2.0))
    found.on_result(result(1, TOPK, bits(0.9, 1), 1.0))
    poor = rung(bits(0.4, 2)[:150], 1.2)
    assert found.on_rung(7, TOPK, poor) is not None
    poor.values["params_m"] = 0.5
    assert found.on_rung(8, TOPK, poor) is None


# ----------------------------------------------------------------------------- with the searcher


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Worker:
    config = SearchConfig.of({
        "images": IMAGES, "store": str(tmp_path_factory.mktemp("store")), "cache": str(cache),
        "device": "cpu",
    })  # fmt: skip
    return Worker.open(study_task(check_job(config), threads=None))


def session_of(folder: StudyFolder, worker: Worker, **changed: Any) -> StudySession:
    early_stopping = changed.pop(
        "early_stopping", EarlyStopping(Race(IMAGES, 0.05, 12), AXES, Provenance())
    )
    given: dict[str, Any] = {
        "objectives": ("top1", "gmacs"), "sampler": "tpe", "seed": 0, "trials": 12, **changed,
    }  # fmt: skip
    return StudySession(
        folder, Space.of(("random", "tome", "topk"), {}, {}), SessionSettings(**given),
        shape_of=ShapeFinder(worker.dense), early_stopping=early_stopping,
    )  # fmt: skip


def started_session(
    tmp_path: Path, worker: Worker, **changed: Any
) -> tuple[StudyFolder, StudySession]:
    """Return a session whose dense model is measured."""
    folder = StudyFolder(tmp_path / "s")
    folder.create()
    session = session_of(folder, worker, **changed)
    assert session.next("dense") is not None
    folder.trials.write(result(0, Recipe(), bits(0.95), 0.1))
    session.complete("dense")
    return folder, session


def stop_one(folder: StudyFolder, session: StudySession) -> int:
    """Measure a strong incumbent, stop a much worse trial, and return its number."""
    strong, poor = session.next("a"), session.next("b")
    assert strong is not None and poor is not None
    folder.trials.write(result(strong.number, strong.recipe, bits(0.9), 0.001))
    session.complete("a")
    assert session.on_rung("b", rung(bits(0.3, 4)[:120], 0.05)) is False
    return poor.number


@pytest.mark.parametrize(
    ("raced_out_as", "state"), [("estimate", TrialState.COMPLETE), ("pruned", TrialState.PRUNED)]
)
def test_stopped_trial_is_durable_before_ray_reports_it(
    tmp_path: Path, worker: Worker, raced_out_as: str, state: TrialState
) -> None:
    folder, session = started_session(tmp_path, worker, raced_out_as=raced_out_as)
    number = stop_one(folder, session)
    durable = folder.trials.get(number)
    assert durable is not None and durable.state == "raced_out"
    assert session.study.trials[number].state == TrialState.RUNNING, "Ray has not reported it yet"
    session.complete("b")
    frozen = session.study.trials[number]
    assert frozen.state == state
    if raced_out_as == "estimate":
        assert frozen.values == [durable.values["top1"], durable.values["gmacs"]]
    assert frozen.user_attrs["raced_out"]["images"] == 120
    assert session.progress.raced_out == 1 and session.progress.done == 3
    assert number not in session.progress.front


def test_restarted_driver_keeps_a_stopped_trial(tmp_path: Path, worker: Worker) -> None:
    folder, session = started_session(tmp_path, worker)
    number = stop_one(folder, session)  # the driver ends here
    before = folder.trials.get(number)
    again = session_of(folder, worker)
    assert again.study.trials[number].state == TrialState.PRUNED
    assert again.progress.raced_out == 1 and again.progress.running == 0
    assert folder.trials.get(number) == before
    key = before.key if before else ""
    assert folder.trials.by_key(key) == before, "the same candidate is not measured again"


def test_patience_ends_a_study_whose_front_does_not_improve(tmp_path: Path, worker: Worker) -> None:
    folder, session = started_session(
        tmp_path, worker, trials=None, patience=3, early_stopping=None
    )
    for i in range(3):
        proposal = session.next(f"t{i}")
        assert proposal is not None
        folder.trials.write(result(proposal.number, proposal.recipe, bits(0.1), 0.2))
        session.complete(f"t{i}")
    assert session.next("end") is None
    assert (
        session.progress.ended == "the hypervolume has not grown by 0.1% for 3 trials; 4 measured"
    )


def test_no_trial_starts_after_the_time_limit(tmp_path: Path, worker: Worker) -> None:
    _, session = started_session(tmp_path, worker, trials=None, seconds=3600.0)
    assert session.next("a") is not None
    session.start -= 3601
    assert session.next("b") is None
    assert "time limit of 3600 s" in session.progress.ended


# --------------------------------------------------------------------------------- on a real Ray


def test_early_stopping_keeps_the_front(
    tmp_path: Path, cache: Path, capacity: ClusterCapacity, worker: Worker
) -> None:
    """Measures every stopped trial in full: its incumbent is at least as good."""
    config = SearchConfig.of({
        "name": "s", "trials": 24, "images": IMAGES, "store": str(tmp_path), "cache": str(cache),
        "workers": 1, "device": "cpu", "latency": "off", "certify": "off", "tracking_uri": "none",
    })  # fmt: skip
    outcome = run_study(check_job(config), cpus=1, gpus=0)
    folder, progress = outcome.folder, outcome.progress
    results = {r.trial: r for r in folder.trials.all()}
    stopped = [r for r in results.values() if r.state == "raced_out"]
    assert len(results) == progress.done == 24 and progress.raced_out == len(stopped) >= 3
    assert progress.images == sum(r.images for r in results.values() if not _same(r))
    for one in stopped:
        assert one.images in rungs(IMAGES)[:-1] or one.images % config.batch == 0 or _same(one)
        whole = measure_recipe(worker, one.trial, one.recipe.to_recipe())
        right = unpack_bits(whole.bits, whole.images)
        same = (right[: one.images] == unpack_bits(one.bits, one.images)).sum()
        assert same >= one.images - 1  # threads may flip a near-tied image
        by = next(r for r in stopped if r.key == one.key and not _same(r))
        winner = results[int(by.reason.split()[2])]
        assert winner.state == "finished"
        assert winner.values["gmacs"] <= whole.values["gmacs"]
        assert winner.values["top1"] >= whole.values["top1"]
    assert not any(folder.training(r.key).exists() for r in stopped)


def _same(one: TrialResult) -> bool:
    return one.reason.startswith("the same candidate")
