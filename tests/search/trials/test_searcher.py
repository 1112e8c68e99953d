"""The searcher without Ray: ask, filter, tell and recover, against a worker that writes results."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from ray.tune.search import Searcher
from timm.models.vision_transformer import VisionTransformer

from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe
from vitpareto.search.choices import SAMPLERS
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.trials.searcher import (
    INTERRUPTIONS,
    FrontSearcher,
    Tally,
    open_storage,
    running_trials,
)

NAMES = ("random", "resize", "tome", "topk")


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=12, num_heads=2, num_classes=10
    ).eval()


class Bench:
    """A study in a folder, and a pretended worker whose accuracy is a function of the cost."""

    def __init__(self, tmp: Path, model: VisionTransformer):
        self.folder = StudyFolder(tmp / "study")
        self.folder.create()
        self.shape: ModelShape = methods.model_shape(model)
        self.reshape = ShapeFinder(model)
        self.measured: list[int] = []

    def searcher(self, trials: int = 20, **changed) -> FrontSearcher:
        given = {
            "objectives": ("top1", "gmacs"),
            "sampler": "tpe",
            "seed": 0,
            "trials": trials,
            "space": {},
            "fixed": {},
            "names": NAMES,
            "window": (None, None),
            "hooks": None,
            **changed,
        }
        space = Space.of(given.pop("names"), given.pop("space"), given.pop("fixed"))
        return FrontSearcher(self.folder, space, reshape=self.reshape, **given)

    def result(self, config: dict, state: str = "finished") -> TrialResult:
        recipe = Recipe.from_dict(config["recipe"])
        gmacs = recipe_macs(recipe, self.reshape(recipe))[1] / 1e9
        values = {"top1": 100 * gmacs / (gmacs + 0.001), "gmacs": gmacs, "params_m": 0.1}
        self.measured.append(config["trial"])
        return TrialResult(
            config["trial"], state, recipe.to_dict(), config["key"],  # type: ignore[arg-type]
            values if state == "finished" else {}, recipe.to_dict(), 8, pack_bits([True] * 8),
            reason="" if state == "finished" else "it raised",
        )  # fmt: skip

    def work(self, searcher: FrontSearcher, trial_id: str, config: dict, state="finished") -> None:
        self.folder.write(self.result(config, state))
        searcher.on_trial_complete(trial_id, {"trial_number": config["trial"]})

    def finish(self, searcher: FrontSearcher) -> list[dict]:
        """Suggest and work, one at a time, until the searcher says FINISHED."""
        seen = []
        for i in range(10_000):
            config = searcher.suggest(f"t{i}")
            if config == Searcher.FINISHED:
                return seen
            assert config is not None, "nothing runs, so nothing can be waited for"
            seen.append(config)
            self.work(searcher, f"t{i}", config)
        raise AssertionError("the searcher did not finish")


@pytest.fixture
def bench(tmp_path: Path, model: VisionTransformer) -> Bench:
    return Bench(tmp_path, model)


def test_dense_is_trial_0_then_the_presets_then_what_optuna_proposes(bench: Bench) -> None:
    searcher = bench.searcher(trials=20)
    seen = bench.finish(searcher)
    assert seen[0]["trial"] == 0 and seen[0]["recipe"] == {}
    assert len(seen) == searcher.tally.finished == 20
    topk = [c["recipe"]["tokens"] for c in seen if _method(c) == "topk"]
    assert [t["keep_rate"] for t in topk[:2]] == [0.75, 0.5]
    assert topk[0]["prune_layers"] == [3, 6, 9]
    assert searcher.tally.ended == "20 trials measured"


def _method(config: dict) -> str:
    return Recipe.from_dict(config["recipe"]).method


def test_nothing_is_compared_before_the_reference_is_known(bench: Bench) -> None:
    searcher = bench.searcher()
    first = searcher.suggest("a")
    assert first["trial"] == 0
    assert searcher.suggest("b") is None
    bench.work(searcher, "a", first)
    assert searcher.suggest("b")["trial"] == 1


def test_the_front_and_hypervolume_follow_the_results(bench: Bench) -> None:
    tallies: list[tuple[int, ...]] = []
    searcher = bench.searcher(hooks=[lambda r, t: tallies.append(t.front)])
    bench.finish(searcher)
    axes = [OBJECTIVES["top1"], OBJECTIVES["gmacs"]]
    expected = {r.trial for r in front_of(bench.folder.results(), axes)}
    assert set(searcher.tally.front) == expected == set(tallies[-1])
    assert searcher.tally.hypervolume > 0


def test_a_known_candidate_is_told_its_values_and_never_handed_out(bench: Bench) -> None:
    # one method with two possible sizes: dense, and few candidates, so that asks must repeat
    searcher = bench.searcher(
        trials=50, names=("resize",), space={"resize.scale": [0.5, 0.76]}, sampler="random"
    )
    seen = bench.finish(searcher)
    sizes = [c["recipe"]["structure"]["size"] for c in seen[1:]]
    assert sorted(sizes) == [32, 40, 48]
    assert "nothing new" in searcher.tally.ended
    assert searcher.tally.duplicates >= 100
    told = [t for t in searcher.study.trials if "duplicate_of" in t.user_attrs]
    by_number = {t.number: t for t in searcher.study.trials}
    assert len(told) == searcher.tally.duplicates
    for trial in told:
        assert trial.state == TrialState.COMPLETE
        assert trial.values == by_number[trial.user_attrs["duplicate_of"]].values


def test_a_duplicate_of_a_running_trial_is_told_when_that_one_is(bench: Bench) -> None:
    searcher = bench.searcher(names=("resize",), space={"resize.scale": [0.5, 0.51]})
    bench.work(searcher, "a", searcher.suggest("a"))
    running = searcher.suggest("b")
    assert running["recipe"]["structure"]["size"] == 32
    assert searcher.suggest("c") is None, "only duplicates are left, and their model still runs"
    waiting = [t for t in searcher.study.trials if "duplicate_of" in t.user_attrs]
    assert waiting and all(t.state == TrialState.RUNNING for t in waiting)
    bench.work(searcher, "b", running)
    states = {t.number: t for t in searcher.study.trials}
    for trial in waiting:
        assert states[trial.number].state == TrialState.COMPLETE
        assert states[trial.number].values == states[running["trial"]].values


def test_outside_the_window_is_told_as_a_violation_and_reaches_no_worker(bench: Bench) -> None:
    dense = bench.shape.macs(bench.shape.dense_counts(), "mid-block") / 1e9
    window = (0.5 * dense, 0.7 * dense)
    searcher = bench.searcher(trials=15, window=window)
    seen = bench.finish(searcher)
    for config in seen[1:]:
        recipe = Recipe.from_dict(config["recipe"])
        assert window[0] <= recipe_macs(recipe, bench.reshape(recipe))[0] / 1e9 <= window[1]
    outside = [t for t in searcher.study.trials if any(v > 0 for v in t.constraints.values())]
    assert len(outside) == searcher.tally.outside > 0
    for trial in outside:
        assert trial.state == TrialState.PRUNED
        recipe = Recipe.from_dict(trial.user_attrs["recipe"])
        gmacs = recipe_macs(recipe, bench.reshape(recipe))[0] / 1e9
        violation = max(window[0] - gmacs, gmacs - window[1])
        assert sum(trial.constraints.values()) == pytest.approx(violation)


def test_a_structure_that_costs_more_than_the_dense_model_reaches_no_worker(bench: Bench) -> None:
    """ReViT's first and last blocks have 10 heads, however few the model has."""
    searcher = bench.searcher(trials=12, names=("revit", "topk"))
    dense = recipe_macs(Recipe(), bench.shape)[0]
    seen = [Recipe.from_dict(c["recipe"]) for c in bench.finish(searcher)]
    assert all(recipe_macs(r, bench.reshape(r))[0] <= dense for r in seen)
    above = [
        t for t in searcher.study.get_trials(deepcopy=False)
        if t.params.get("method") == "revit" and t.state == TrialState.PRUNED
    ]  # fmt: skip
    assert above and searcher.tally.outside >= len(above)


def test_a_target_that_the_model_does_not_allow_is_one_failed_proposal(bench: Bench) -> None:
    """A model of 32 channels cannot be cut to a fifth."""
    searcher = bench.searcher(trials=6, names=("nvit",))
    seen = bench.finish(searcher)
    assert len(seen) == searcher.tally.finished == 6
    failed = searcher.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    assert failed and all("cannot reach a target of 0.2" in t.user_attrs["reason"] for t in failed)


def test_a_calibrated_recipe_is_asked_for_when_its_bounds_meet_the_window(bench: Bench) -> None:
    dense = bench.shape.macs(bench.shape.dense_counts(), "mid-block") / 1e9
    searcher = bench.searcher(names=("rajni",), window=(0.5 * dense, 0.7 * dense))
    bench.work(searcher, "a", searcher.suggest("a"))
    config = searcher.suggest("b")
    assert _method(config) == "rajni"
    # the worker calibrated it, found it outside, and measured nothing
    searcher.on_trial_complete("b", {"outside": True, "violation": 0.2 * dense})
    trial = searcher.study.trials[config["trial"]]
    assert trial.state == TrialState.PRUNED
    assert sum(trial.constraints.values()) == pytest.approx(0.2 * dense)
    assert bench.folder.result(config["trial"]) is None
    assert searcher.tally.outside >= 1 and searcher.tally.finished == 1


def test_a_failed_trial_is_counted_and_not_run_again(bench: Bench) -> None:
    searcher = bench.searcher(trials=5)
    bench.work(searcher, "a", searcher.suggest("a"))
    config = searcher.suggest("b")
    bench.work(searcher, "b", config, state="failed")
    bench.finish(searcher)
    assert (searcher.tally.finished, searcher.tally.failed) == (4, 1)
    assert searcher.study.trials[config["trial"]].state == TrialState.FAIL
    assert sum(r.key == config["key"] for r in bench.folder.results()) == 1


def test_a_reference_that_fails_ends_the_study_with_its_reason(bench: Bench) -> None:
    searcher = bench.searcher()
    bench.work(searcher, "a", searcher.suggest("a"), state="failed")
    assert searcher.suggest("b") == Searcher.FINISHED
    assert searcher.tally.ended == "the dense model could not be measured: it raised"


def test_a_trial_whose_worker_died_runs_again_at_most_three_times(bench: Bench) -> None:
    searcher = bench.searcher(trials=3, names=("resize",), space={"resize.scale": [0.5, 0.51]})
    bench.work(searcher, "a", searcher.suggest("a"))
    handed_out = []
    for i in range(10):
        config = searcher.suggest(f"b{i}")
        if not isinstance(config, dict):
            break
        handed_out.append(config["key"])
        searcher.on_trial_complete(f"b{i}", error=True)
        searcher.on_trial_complete(f"b{i}", error=True)  # Ray may say it twice
    assert len(handed_out) == 4 and len(set(handed_out)) == 1
    failed = [r for r in bench.folder.results() if r.state == "failed"]
    assert len(failed) == 1 and failed[0].reason == "the worker died, 4 times"


def test_on_trial_complete_never_raises(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = bench.searcher()
    config = searcher.suggest("a")
    bench.folder.write(bench.result(config))

    def broken(*_: object, **__: object) -> None:
        raise OSError("the journal's disk is gone")

    monkeypatch.setattr(searcher.study, "tell", broken)
    searcher.on_trial_complete("a", {})
    searcher.on_trial_complete("a", {})
    searcher.on_trial_complete("never heard of", error=True)
    assert "could not be told" in caplog.text


def test_a_restart_tells_what_is_on_disk_and_runs_the_rest_again(bench: Bench) -> None:
    first = bench.searcher(trials=12)
    for i in range(6):
        config = first.suggest(f"t{i}")
        bench.work(first, f"t{i}", config)
    written = first.suggest("written")  # its worker was done, the driver never heard of it
    bench.folder.write(bench.result(written))
    lost = first.suggest("lost")  # its worker died with the driver
    del first

    second = bench.searcher(trials=12)
    assert second.tally.finished == 7
    states = {t.number: t for t in second.study.trials}
    assert states[written["trial"]].state == TrialState.COMPLETE
    assert states[lost["trial"]].state == TrialState.FAIL
    assert states[lost["trial"]].user_attrs["reason"] == "interrupted"
    seen = bench.finish(second)
    assert lost["key"] in {c["key"] for c in seen}
    assert len(bench.measured) == len(set(bench.measured)) == 12
    keys = [r.key for r in bench.folder.results()]
    assert len(keys) == len(set(keys)) == 12
    assert not [t for t in second.study.trials if t.state == TrialState.RUNNING]


def test_a_trial_outlives_many_drivers_but_not_any_number_of_them(bench: Bench) -> None:
    """A driver's end is seldom a trial's doing: it counts apart, and more of them are allowed."""
    first = bench.searcher(names=("random",))
    bench.work(first, "r", first.suggest("r"))
    key = first.suggest("t")["key"]
    for restart in range(INTERRUPTIONS):
        again = bench.searcher(names=("random",))
        # the presets are ahead of it in the queue
        asked = (again.suggest(f"t{restart}.{i}") for i in range(10))
        assert any(config["key"] == key for config in asked), restart
    bench.searcher(names=("random",))
    failed = {r.key: r.reason for r in bench.folder.results() if r.state == "failed"}
    assert failed[key] == f"interrupted, {INTERRUPTIONS + 1} times"


def test_a_dense_reference_that_was_interrupted_runs_again_as_the_reference(bench: Bench) -> None:
    first = bench.searcher()
    assert first.suggest("a")["recipe"] == {}
    del first
    second = bench.searcher()
    config = second.suggest("a")
    assert config["recipe"] == {} and config["trial"] == 0
    bench.work(second, "a", config)
    assert second.front is not None


def test_a_study_that_has_its_trials_goes_on_with_more(bench: Bench) -> None:
    bench.finish(bench.searcher(trials=8))
    again = bench.searcher(trials=8)
    assert again.suggest("a") == Searcher.FINISHED
    more = bench.searcher(trials=11)
    assert len(bench.finish(more)) == 3
    assert len(bench.folder.results()) == 11


def test_the_journal_is_repaired_after_a_kill(bench: Bench) -> None:
    bench.finish(bench.searcher(trials=4))
    journal = bench.folder.journal
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker')
    (journal.parent / f"{journal.name}.lock").symlink_to(journal)
    open_storage(bench.folder)
    assert journal.read_bytes() == whole
    assert len(bench.finish(bench.searcher(trials=6))) == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_proposes_the_same_trials(
    tmp_path: Path, model: VisionTransformer, sampler: str
) -> None:
    def keys(place: str, seed: int) -> list[str]:
        bench = Bench(tmp_path / place, model)
        seen = bench.finish(bench.searcher(trials=25, sampler=sampler, seed=seed))
        return [c["key"] for c in seen]

    assert keys("a", 0) == keys("b", 0)
    assert keys("c", 1) != keys("a2", 0)


def test_running_trials_are_listed_only_while_a_driver_lives(bench: Bench) -> None:
    searcher = bench.searcher()
    config = searcher.suggest("a")
    assert running_trials(bench.folder) == []
    with bench.folder.locked():
        (running,) = running_trials(bench.folder)
    assert (running.trial, running.state) == (config["trial"], "running")


def test_a_choice_the_model_does_not_allow_is_failed_with_its_reason(bench: Bench) -> None:
    searcher = bench.searcher()
    bench.work(searcher, "a", searcher.suggest("a"))
    while searcher.suggest("x") is not None and len(searcher.running) < 5:
        searcher.running[f"kept{len(searcher.running)}"] = searcher.running.pop("x")
    impossible = {"method": "tome", "tome.r_fraction": 0.05, "tome.inflection": 0.0}
    searcher.study.enqueue_trial(impossible)
    broken = methods.get("tome")

    def refuse(*_: object) -> dict:
        raise methods.BadInput("tome cannot do that here")

    try:
        broken.resolve = refuse  # type: ignore[method-assign]
        for _ in range(20):
            searcher._ask()
    finally:
        del broken.resolve
    reasons = [t.user_attrs.get("reason") for t in searcher.study.trials]
    assert "tome cannot do that here" in reasons


def test_hooks_that_raise_do_not_stop_the_search(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: TrialResult | None, __: Tally) -> None:
        raise RuntimeError("a broken terminal")

    searcher = bench.searcher(trials=3, hooks=[broken])
    assert len(bench.finish(searcher)) == 3
    assert "progress hook raised" in caplog.text


def test_result_files_hold_what_optuna_was_told(bench: Bench) -> None:
    searcher = bench.searcher(trials=6)
    bench.finish(searcher)
    storage = optuna.load_study(study_name=bench.folder.name, storage=searcher.study._storage)
    for path in sorted((bench.folder.folder / "trials").glob("*.json")):
        raw = json.loads(path.read_text())
        told = storage.trials[raw["trial"]].values
        assert told == [raw["values"]["top1"], raw["values"]["gmacs"]]
