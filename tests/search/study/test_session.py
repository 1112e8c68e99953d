"""A study's session: ask, filter, tell and recover, with a simulated worker that writes results."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from timm.models.vision_transformer import VisionTransformer

from tests.logs import logged
from vitpareto import methods
from vitpareto.methods import Code, ModelShape, Recipe
from vitpareto.search.choices import SAMPLERS
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.optuna_storage import open_storage
from vitpareto.search.study.optuna_trials import INTERRUPTIONS, running_trials
from vitpareto.search.study.progress import StudyProgress
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space

NAMES = ("random", "resize", "tome", "topk")
FINISHED = "finished"


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64, patch_size=8, embed_dim=32, depth=12, num_heads=2, num_classes=10
    ).eval()


class Bench:
    """A study in a folder, and a simulated worker whose accuracy is a function of the cost."""

    def __init__(self, tmp: Path, model: VisionTransformer):
        self.folder = StudyFolder(tmp / "study")
        self.folder.create()
        self.shape: ModelShape = methods.model_shape(model)
        self.shape_of = ShapeFinder(model)
        self.measured: list[int] = []

    def session(
        self, trials: int = 20, hooks=(), names=NAMES, space=None, **changed
    ) -> StudySession:
        given = {"objectives": ("top1", "gmacs"), "sampler": "tpe", "seed": 0, "trials": trials}
        return StudySession(
            self.folder,
            Space.of(names, space or {}, {}),
            SessionSettings(**{**given, **changed}),
            shape_of=self.shape_of,
            hooks=hooks,
        )

    def result(self, config: dict, state: str = "finished") -> TrialResult:
        recipe, recorded = (
            Recipe.from_dict(config["recipe"]),
            RecordedRecipe.from_json(config["recipe"]),
        )
        gmacs = recipe_macs(recipe, self.shape_of(recipe))[1] / 1e9
        values = {"top1": 100 * gmacs / (gmacs + 0.001), "gmacs": gmacs, "params_m": 0.1}
        self.measured.append(config["trial"])
        return TrialResult(
            config["trial"], state, recorded, config["key"],  # type: ignore[arg-type]
            values if state == "finished" else {}, recorded, 8, pack_bits([True] * 8),
            reason="" if state == "finished" else "it raised",
        )  # fmt: skip

    def work(self, session: StudySession, trial_id: str, config: dict, state="finished") -> None:
        self.folder.trials.write(self.result(config, state))
        session.complete(trial_id)

    def finish(self, session: StudySession) -> list[dict]:
        """Propose and measure, one at a time, until the session ends."""
        seen = []
        for i in range(10_000):
            config = ask(session, f"t{i}")
            if config == FINISHED:
                return seen
            assert config is not None, "no trial is running, so the session must not wait"
            seen.append(config)
            self.work(session, f"t{i}", config)
        raise AssertionError("the session did not end")


def ask(session: StudySession, trial_id: str) -> dict | str | None:
    """The next candidate's config, None if there is none now, or FINISHED."""
    proposal = session.next(trial_id)
    if proposal is not None:
        return proposal.config()
    return FINISHED if session.progress.ended else None


@pytest.fixture
def bench(tmp_path: Path, model: VisionTransformer) -> Bench:
    return Bench(tmp_path, model)


def test_dense_is_trial_0_followed_by_presets_and_optunas_proposals(bench: Bench) -> None:
    session = bench.session(trials=20)
    seen = bench.finish(session)
    assert seen[0]["trial"] == 0 and seen[0]["recipe"] == {}
    assert len(seen) == session.progress.finished == 20
    topk = [c["recipe"]["tokens"] for c in seen if _method(c) == "topk"]
    assert [t["keep_rate"] for t in topk[:2]] == [0.75, 0.5]
    assert topk[0]["prune_layers"] == [3, 6, 9]
    assert session.progress.ended == "20 trials measured"


def _method(config: dict) -> str:
    return Recipe.from_dict(config["recipe"]).method


def test_no_second_proposal_before_the_dense_model_is_measured(bench: Bench) -> None:
    session = bench.session()
    first = ask(session, "a")
    assert first["trial"] == 0
    assert ask(session, "b") is None
    bench.work(session, "a", first)
    assert ask(session, "b")["trial"] == 1


def test_front_and_hypervolume_follow_the_results(bench: Bench) -> None:
    tallies: list[tuple[int, ...]] = []
    session = bench.session(hooks=[lambda r, t: tallies.append(t.front)])
    bench.finish(session)
    axes = [OBJECTIVES["top1"], OBJECTIVES["gmacs"]]
    expected = {r.trial for r in front_of(bench.folder.trials.all(), axes)}
    assert set(session.progress.front) == expected == set(tallies[-1])
    assert session.progress.hypervolume > 0


def test_known_candidate_is_told_its_values_and_not_proposed(bench: Bench) -> None:
    # one method with two possible sizes: dense, and few candidates, so that asks must repeat
    session = bench.session(
        trials=50, names=("resize",), space={"resize.scale": [0.5, 0.76]}, sampler="random"
    )
    seen = bench.finish(session)
    sizes = [c["recipe"]["structure"]["size"] for c in seen[1:]]
    assert sorted(sizes) == [32, 40, 48]
    assert "were not new" in session.progress.ended
    assert session.progress.duplicates >= 100
    told = [t for t in session.study.trials if "duplicate_of" in t.user_attrs]
    by_number = {t.number: t for t in session.study.trials}
    assert len(told) == session.progress.duplicates
    for trial in told:
        assert trial.state == TrialState.COMPLETE
        assert trial.values == by_number[trial.user_attrs["duplicate_of"]].values


def test_duplicate_of_a_running_trial_is_told_with_it(bench: Bench) -> None:
    session = bench.session(names=("resize",), space={"resize.scale": [0.5, 0.51]})
    bench.work(session, "a", ask(session, "a"))
    running = ask(session, "b")
    assert running["recipe"]["structure"]["size"] == 32
    assert ask(session, "c") is None, "only duplicates are left, and the first of them still runs"
    waiting = [t for t in session.study.trials if "duplicate_of" in t.user_attrs]
    assert waiting and all(t.state == TrialState.RUNNING for t in waiting)
    bench.work(session, "b", running)
    states = {t.number: t for t in session.study.trials}
    for trial in waiting:
        assert states[trial.number].state == TrialState.COMPLETE
        assert states[trial.number].values == states[running["trial"]].values


def test_candidate_outside_the_window_is_told_as_a_violation_and_not_proposed(bench: Bench) -> None:
    dense = bench.shape.macs(bench.shape.dense_counts(), "mid-block") / 1e9
    window = (0.5 * dense, 0.7 * dense)
    session = bench.session(trials=15, window=BudgetWindow(*window))
    seen = bench.finish(session)
    for config in seen[1:]:
        recipe = Recipe.from_dict(config["recipe"])
        assert window[0] <= recipe_macs(recipe, bench.shape_of(recipe))[0] / 1e9 <= window[1]
    outside = [t for t in session.study.trials if any(v > 0 for v in t.constraints.values())]
    assert len(outside) == session.progress.outside > 0
    for trial in outside:
        assert trial.state == TrialState.PRUNED
        recipe = Recipe.from_dict(trial.user_attrs["recipe"])
        gmacs = recipe_macs(recipe, bench.shape_of(recipe))[0] / 1e9
        violation = max(window[0] - gmacs, gmacs - window[1])
        assert sum(trial.constraints.values()) == pytest.approx(violation)


def test_structure_that_costs_more_than_the_dense_model_is_not_proposed(bench: Bench) -> None:
    """ReViT's first and last blocks have 10 heads, however few the model has."""
    session = bench.session(trials=12, names=("revit", "topk"))
    dense = recipe_macs(Recipe(), bench.shape)[0]
    seen = [Recipe.from_dict(c["recipe"]) for c in bench.finish(session)]
    assert all(recipe_macs(r, bench.shape_of(r))[0] <= dense for r in seen)
    above = [
        t for t in session.study.get_trials(deepcopy=False)
        if t.params.get("method") == "revit" and t.state == TrialState.PRUNED
    ]  # fmt: skip
    assert above and session.progress.outside >= len(above)


def test_target_that_the_model_does_not_allow_is_a_failed_proposal(bench: Bench) -> None:
    """A model of 32 channels cannot be cut to a fifth."""
    session = bench.session(trials=6, names=("nvit",))
    seen = bench.finish(session)
    assert len(seen) == session.progress.finished == 6
    failed = session.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    assert failed and all("target" in t.user_attrs["reason"] for t in failed)


def test_calibrated_recipe_is_proposed_if_its_possible_costs_overlap_the_window(
    bench: Bench,
) -> None:
    dense = bench.shape.macs(bench.shape.dense_counts(), "mid-block") / 1e9
    session = bench.session(names=("rajni",), window=BudgetWindow(0.5 * dense, 0.7 * dense))
    bench.work(session, "a", ask(session, "a"))
    config = ask(session, "b")
    assert _method(config) == "rajni"
    # the worker calibrated it and found it outside the window
    session.complete("b", violation=0.2 * dense)
    trial = session.study.trials[config["trial"]]
    assert trial.state == TrialState.PRUNED
    assert sum(trial.constraints.values()) == pytest.approx(0.2 * dense)
    assert bench.folder.trials.get(config["trial"]) is None
    assert session.progress.outside >= 1 and session.progress.finished == 1


def test_failed_trial_is_counted_and_not_repeated(bench: Bench) -> None:
    session = bench.session(trials=5)
    bench.work(session, "a", ask(session, "a"))
    config = ask(session, "b")
    bench.work(session, "b", config, state="failed")
    bench.finish(session)
    assert (session.progress.finished, session.progress.failed) == (4, 1)
    assert session.study.trials[config["trial"]].state == TrialState.FAIL
    assert sum(r.key == config["key"] for r in bench.folder.trials.all()) == 1


def test_failed_reference_ends_the_study_with_its_reason(bench: Bench) -> None:
    session = bench.session()
    bench.work(session, "a", ask(session, "a"), state="failed")
    assert ask(session, "b") == FINISHED
    assert session.progress.ended == "the dense model could not be measured: it raised"


def test_trial_whose_worker_died_is_retried_at_most_three_times(bench: Bench) -> None:
    session = bench.session(trials=3, names=("resize",), space={"resize.scale": [0.5, 0.51]})
    bench.work(session, "a", ask(session, "a"))
    handed_out = []
    for i in range(10):
        config = ask(session, f"b{i}")
        if not isinstance(config, dict):
            break
        handed_out.append(config["key"])
        session.complete(f"b{i}", worker_died=True)
        session.complete(f"b{i}", worker_died=True)  # Ray may report it twice
    assert len(handed_out) == 4 and len(set(handed_out)) == 1
    failed = [r for r in bench.folder.trials.all() if r.state == "failed"]
    assert len(failed) == 1 and failed[0].reason == "the worker died, 4 times"


def test_complete_never_raises(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = bench.session()
    config = ask(session, "a")
    bench.folder.trials.write(bench.result(config))

    def broken(*_: object, **__: object) -> None:
        raise OSError("the journal's disk is gone")

    monkeypatch.setattr(session.study, "tell", broken)
    session.complete("a")
    session.complete("a")
    session.complete("unknown id", worker_died=True)
    (record,) = logged(caplog, "session")
    assert record.args == (config["trial"],) and record.exc_info is not None


def test_restart_tells_results_on_disk_and_retries_the_others(bench: Bench) -> None:
    first = bench.session(trials=12)
    for i in range(6):
        config = ask(first, f"t{i}")
        bench.work(first, f"t{i}", config)
    written = ask(first, "written")  # its worker was done, the driver unknown id it
    bench.folder.trials.write(bench.result(written))
    lost = ask(first, "lost")  # its worker died with the driver
    del first

    second = bench.session(trials=12)
    assert second.progress.finished == 7
    states = {t.number: t for t in second.study.trials}
    assert states[written["trial"]].state == TrialState.COMPLETE
    assert states[lost["trial"]].state == TrialState.FAIL
    assert states[lost["trial"]].user_attrs["reason"] == "interrupted"
    seen = bench.finish(second)
    assert lost["key"] in {c["key"] for c in seen}
    assert len(bench.measured) == len(set(bench.measured)) == 12
    keys = [r.key for r in bench.folder.trials.all()]
    assert len(keys) == len(set(keys)) == 12
    assert not [t for t in second.study.trials if t.state == TrialState.RUNNING]


def test_interrupted_trial_is_retried_a_limited_number_of_times(bench: Bench) -> None:
    """Interruptions are counted apart from retries, and more of them are allowed."""
    first = bench.session(names=("random",))
    bench.work(first, "r", ask(first, "r"))
    key = ask(first, "t")["key"]
    for restart in range(INTERRUPTIONS):
        again = bench.session(names=("random",))
        # the presets are ahead of it in the queue
        proposed = (ask(again, f"t{restart}.{i}") for i in range(10))
        assert any(config["key"] == key for config in proposed), restart
    bench.session(names=("random",))
    failed = {r.key: r.reason for r in bench.folder.trials.all() if r.state == "failed"}
    assert failed[key] == f"interrupted, {INTERRUPTIONS + 1} times"


def test_interrupted_reference_is_retried_as_trial_0(bench: Bench) -> None:
    first = bench.session()
    assert ask(first, "a")["recipe"] == {}
    del first
    second = bench.session()
    config = ask(second, "a")
    assert config["recipe"] == {} and config["trial"] == 0
    bench.work(second, "a", config)
    assert second.tracker.front is not None


def test_complete_study_continues_with_a_larger_number_of_trials(bench: Bench) -> None:
    bench.finish(bench.session(trials=8))
    again = bench.session(trials=8)
    assert ask(again, "a") == FINISHED
    more = bench.session(trials=11)
    assert len(bench.finish(more)) == 3
    assert len(bench.folder.trials.all()) == 11


def test_the_journal_is_repaired_after_a_kill(bench: Bench) -> None:
    bench.finish(bench.session(trials=4))
    journal = bench.folder.journal
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker')
    (journal.parent / f"{journal.name}.lock").symlink_to(journal)
    open_storage(bench.folder)
    assert journal.read_bytes() == whole
    assert len(bench.finish(bench.session(trials=6))) == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_proposes_the_same_trials(
    tmp_path: Path, model: VisionTransformer, sampler: str
) -> None:
    def keys(place: str, seed: int) -> list[str]:
        bench = Bench(tmp_path / place, model)
        seen = bench.finish(bench.session(trials=25, sampler=sampler, seed=seed))
        return [c["key"] for c in seen]

    assert keys("a", 0) == keys("b", 0)
    assert keys("c", 1) != keys("a2", 0)


def test_running_trials_are_listed_only_while_a_driver_runs(bench: Bench) -> None:
    session = bench.session()
    config = ask(session, "a")
    assert running_trials(bench.folder) == []
    with bench.folder.lock.hold():
        (running,) = running_trials(bench.folder)
    assert (running.trial, running.state) == (config["trial"], "running")


def test_choice_that_the_model_does_not_allow_is_failed_with_its_reason(bench: Bench) -> None:
    session = bench.session()
    bench.work(session, "a", ask(session, "a"))
    while ask(session, "x") is not None and len(session.running) < 5:
        session.running[f"running{len(session.running)}"] = session.running.pop("x")
    impossible = {"method": "tome", "tome.r_fraction": 0.05, "tome.inflection": 0.0}
    session.study.enqueue_trial(impossible)
    broken = methods.get("tome")

    def refuse(*_: object) -> dict:
        raise methods.BadInput("tome cannot do that here", Code.UNSUPPORTED)

    try:
        broken.resolve = refuse  # type: ignore[method-assign]
        for _ in range(20):
            session.proposals.ask(session.running.values())
    finally:
        del broken.resolve
    reasons = [t.user_attrs.get("reason") for t in session.study.trials]
    assert "tome cannot do that here" in reasons


def test_hook_that_raises_does_not_stop_the_search(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: TrialResult | None, __: StudyProgress) -> None:
        raise RuntimeError("a broken terminal")

    session = bench.session(trials=3, hooks=[broken])
    assert len(bench.finish(session)) == 3
    records = logged(caplog, "session")
    assert len(records) >= 3 and all(r.exc_info is not None for r in records)


def test_result_files_and_optuna_hold_the_same_values(bench: Bench) -> None:
    session = bench.session(trials=6)
    bench.finish(session)
    storage = optuna.load_study(study_name=bench.folder.name, storage=session.study._storage)
    for path in sorted((bench.folder.folder / "trials").glob("*.json")):
        raw = json.loads(path.read_text())
        told = storage.trials[raw["trial"]].values
        assert told == [raw["values"]["top1"], raw["values"]["gmacs"]]
