"""A study whose methods are trained, on a real Ray: prepared once, trained in trials, rebuilt from
the study alone, recovered afterwards. Images are noise: what is tested is that nothing is lost.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.refusals import refused
from tests.search.small import image_folder
from vitpareto import methods
from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.methods import Recipe
from vitpareto.methods.slicing.sliced_model import model_widths
from vitpareto.methods.slicing.snapshots import TrajectorySnapshots
from vitpareto.search.compare.trace_request import TraceRequest
from vitpareto.search.errors import UserError
from vitpareto.search.export.bundle import export
from vitpareto.search.export.trial_choice import choose_trial
from vitpareto.search.export.verification import verify
from vitpareto.search.measure import macs
from vitpareto.search.measure.accuracy import evaluate
from vitpareto.search.measure.block_timing import measure_latency_table
from vitpareto.search.measure.fvcore_macs import fvcore_macs
from vitpareto.search.models.loading import load_model
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.front_table import front_rows
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult, unpack_bits
from vitpareto.search.tracking.run_contents import trial_runs
from vitpareto.search.training.loop import Epoch
from vitpareto.search.training.preparation_cache import epochs_key
from vitpareto.search.training.settings import TrainingSettings, train_candidate
from vitpareto.search.trials.candidates import CandidateTrainer
from vitpareto.search.trials.job_check import CheckedJob, check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.preparations import (
    preparation_summary,
    prepare_shared,
)
from vitpareto.search.trials.recovery import NotRecovered, Recovery
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.study_task import study_task, training_for
from vitpareto.search.trials.worker import CHECKPOINT, Worker

pytestmark = pytest.mark.slow

METHODS = "nvit,patchmerger,rajni,tnt,topk"
CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    image_folder(root / "train", CLASSES, 3)
    image_folder(root / "val", CLASSES, 8)
    return root


def job(store: Path, data: Path, cache: Path, **changed: Any) -> SearchConfig:
    given = {
        "name": "s", "trials": 16, "store": str(store), "cache": str(cache), "workers": 2,
        "device": "cpu", "data": str(data), "latency": "off", "methods": METHODS,
        "train_epochs": 2, "prepare_epochs": 1, "lr": 1e-3, "train_batch": 10,
        "space": {"nvit.cost": [0.85, 0.9]}, "race": "off", "certify": "off",
    }  # fmt: skip
    return SearchConfig.of({**given, **changed})


class Study:
    def __init__(self, folder: StudyFolder, tally: Any, said: list[str]):
        self.folder, self.tally, self.said = folder, tally, said
        self.results = folder.trials.all()

    def of(self, *steps: str) -> list[TrialResult]:
        """The results of these methods."""
        return [r for r in self.results if set(r.method.split("+")) & set(steps)]


def search(config: SearchConfig, capacity: ClusterCapacity) -> Study:
    said: list[str] = []
    prepared = check_job(config)
    outcome = run_study(prepared, cpus=capacity.cpus, gpus=capacity.gpus, report=said.append)
    folder, tally = outcome.folder, outcome.progress
    return Study(folder, tally, said)


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, data: Path, cache: Path, capacity: ClusterCapacity
) -> Study:
    return search(job(tmp_path_factory.mktemp("store"), data, cache), capacity)


# --- the study


def test_every_kind_of_candidate_is_measured(study: Study) -> None:
    assert [r.state for r in study.results] == ["finished"] * 16, [r.reason for r in study.results]
    tried = {r.method for r in study.results}
    assert {"tnt", "patchmerger", "topk", "rajni"} <= tried
    two = {m for m in tried if m.startswith("nvit+")}
    assert two, "both kinds of pruning in one recipe"
    for result in study.results:
        resolved = result.rebuilt_from.to_recipe()
        trained = {s.method for s in (resolved.structure, resolved.tokens) if s is not None}
        named = resolved.weights is not None
        assert named == any(epochs_key(m) for m in trained), result.method
        assert not named or study.folder.artifacts.has(str(resolved.weights))
        assert result.recipe.weights is None, "as it was proposed"


def test_shared_preparations_are_trained_once(study: Study) -> None:
    store = study.folder.folder.parent
    made = [json.loads(p.read_text()) for p in store.glob(".prepared/*/what.json")]
    on_dense = [w for w in made if w["model"] == w["teacher"]]
    assert sorted(w["method"] for w in on_dense) == ["nvit", "tnt"]
    assert not list(store.glob(".prepared/*/progress"))
    assert study.said[0] == "preparing nvit and tnt, once for all trials"
    # where it takes long, lines of progress stand between
    ended = [line for line in study.said[1:] if ": prepared in " in line]
    assert sorted(line.partition(":")[0] for line in ended) == ["nvit", "tnt"]
    plain = [r for r in study.of("tnt") if r.method == "tnt"]
    assert len(plain) >= 2
    assert len({r.rebuilt_from.to_recipe().weights for r in plain}) == 1, "one training for all"
    assert all(not use.fresh for r in plain for use in r.provenance.prepared or ())
    lines = preparation_summary(study.folder, study.results)
    counted = len([r for r in plain])
    assert any(line.startswith("tnt ") and line.endswith(f" {counted} trials") for line in lines)
    used = len(study.of("nvit"))
    assert any(line.startswith("nvit ") and f"used by {used} trial" in line for line in lines)


def test_another_study_of_the_store_reuses_preparations(
    study: Study, data: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    store = study.folder.folder.parent
    before = {p: p.stat().st_mtime_ns for p in store.glob(".prepared/*/done.json")}
    other = check_job(job(store, data, cache, name="other", methods="tnt,nvit", trials=3))
    said: list[str] = []
    task = prepare_shared(other.trained, study_task(other, threads=1), 1, 0, said.append)
    assert len(said) == 3 and all("found in the cache; prepared" in line for line in said[1:])
    assert {p: p.stat().st_mtime_ns for p in store.glob(".prepared/*/done.json")} == before
    assert all(
        " before this study) and used by 0" in line
        for line in preparation_summary(other.folder, [])
    )
    assert task.training is not None and set(task.training.records) == {"nvit", "tnt"}
    outcome = task.training.records["nvit"].outcome
    assert isinstance(outcome, TrajectorySnapshots)
    assert {s.target for s in outcome.snapshots} == {0.85, 0.9}
    for digest in outcome.digests:
        assert other.folder.artifacts.has(digest), "a study stores what its recipes name"


def test_costs_are_known_before_trials_run(study: Study) -> None:
    dense = load_model("digits")
    (record,) = (r for r in study.folder.preparations.read() if r.method == "nvit")
    assert isinstance(record.outcome, TrajectorySnapshots)
    snapshots = {s.target: s for s in record.outcome.snapshots}
    assert sorted(snapshots) == [0.85, 0.9]
    whole = macs(dense)
    for target, snapshot in snapshots.items():
        assert 0.97 * target <= snapshot.reached <= target
    for result in study.of("nvit"):
        if result.method == "nvit":
            target = result.recipe.to_json()["structure"]["target"]
            share = 1e9 * result.values["gmacs"] / whole
            assert share == pytest.approx(snapshots[target].reached)
        assert result.values["params_m"] < study.results[0].values["params_m"]


def test_a_result_is_rebuilt_from_the_study(study: Study, data: Path, cache: Path) -> None:
    """Second implementation: weights by digest, `Recipe.build`, one plain evaluation."""
    prepared = check_job(job(study.folder.folder.parent, data, cache))
    dense, split = load_model("digits", study.folder.weights), prepared.data.split("search")
    for result in study.results:
        recipe = result.rebuilt_from.to_recipe()
        state = None if recipe.weights is None else study.folder.artifacts.load(recipe.weights)
        built = recipe.build(dense, weights=state)
        seen = evaluate(
            built, split, prepared.model.preprocess, batch=4, device="cpu", dtype=torch.float32
        )
        flipped = int(np.sum(seen.top1 != unpack_bits(result.bits, result.images)))
        assert flipped <= 1, (str(recipe), flipped)  # near-tied
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert fvcore_macs(built, images) / 1e9 == pytest.approx(result.values["gmacs"], rel=1e-3)


def test_a_trained_trial_records_its_training_and_deletes_its_checkpoint(study: Study) -> None:
    assert not list((study.folder.folder / "training").glob("*"))
    trained = study.of("patchmerger")
    assert len(trained) >= 2
    for result in trained:
        said = result.provenance.training
        assert (said.settings.epochs, said.settings.lr, said.settings.batch) == (2, 1e-3, 10)
        assert said.loss > 0 and said.seconds > 0
    assert len({r.rebuilt_from.to_recipe().weights for r in trained}) == len(trained)


def test_continuing_a_study_trains_nothing_again(
    study: Study, data: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    again = search(job(study.folder.folder.parent, data, cache), capacity)
    assert again.said == [] and again.tally.ended == "16 trials measured"
    assert again.tally.front == study.tally.front


@pytest.mark.parametrize(
    "change", [{"train_epochs": 3}, {"prepare_epochs": 2}, {"lr": 1e-4}, {"train_batch": 5}]
)
def test_a_study_refuses_other_training_settings(
    study: Study, data: Path, cache: Path, change: dict[str, Any]
) -> None:
    with refused("mismatch") as caught:
        check_job(job(study.folder.folder.parent, data, cache, **change))
    differences = caught.value.details["differences"]
    assert {key: asked for key, (_, asked) in differences.items()} == change


def test_a_study_without_training_does_not_depend_on_it(
    tmp_path: Path, data: Path, cache: Path
) -> None:
    plain = {"methods": "topk", "space": {}, "train_epochs": 0, "prepare_epochs": 0}
    prepared = check_job(job(tmp_path, data, cache, **plain))
    assert not {"lr", "train_epochs", "train_fingerprint"} & set(prepared.identity)
    assert study_task(prepared, threads=None).training is None


# --- export, show


def test_a_recipe_of_two_parts_is_exported_and_verified(
    study: Study, cache: Path, tmp_path: Path
) -> None:
    two = next(r for r in study.of("nvit") if "+" in r.method)
    bundle = export(study.folder, two, tmp_path / "bundle", cache=str(cache), images=8)
    assert verify(bundle).verified
    said = json.loads((bundle / "result.json").read_text())
    assert said["recipe"] == two.rebuilt_from.to_json() and said["recipe"]["weights"]
    asked = TraceRequest.of_trial(study.folder, two.trial)
    assert asked.trained is not None and asked.recipe.weights == said["recipe"]["weights"]


def test_missing_weights_are_refused(study: Study, cache: Path, tmp_path: Path) -> None:
    copy = StudyFolder(tmp_path / "copy")
    shutil.copytree(study.folder.folder, copy.folder)
    shutil.rmtree(copy.folder / "weights")
    trained = study.of("patchmerger")[0]
    with pytest.raises(UserError):
        export(copy, trained, tmp_path / "bundle", cache=str(cache))
    assert not (tmp_path / "bundle").exists()


# --- one trial


@pytest.fixture
def prepared(tmp_path: Path, data: Path, cache: Path) -> CheckedJob:
    return check_job(job(tmp_path, data, cache, methods="patchmerger,tnt", space={}))


def worker_of(prepared: CheckedJob, trial: TrainingSettings, dtype: str = "float32") -> Worker:
    task = study_task(prepared, threads=None)
    execution = replace(task.execution, dtype=dtype)
    training = training_for(prepared, trial)
    return Worker.open(replace(task, training=training, execution=execution))


MERGE = Recipe.of("patchmerger", prune_layers=(3, 6), num_tokens=(20, 8))


class Killed(CandidateTrainer):
    """A trainer whose process is killed when its first epoch has ended."""

    def fit(self, model, settings, recipe, checkpoint) -> list[Epoch]:
        def stop(epoch: Epoch) -> None:
            raise KeyboardInterrupt

        own = self.training
        return train_candidate(
            model, own.split, own.preprocess, settings, data=own.data, teacher=self.dense,
            checkpoint=checkpoint, progress=stop,
            about={"model": self.fingerprint, "recipe": recipe.to_dict()},
        )  # fmt: skip


def test_a_killed_trial_continues_from_its_last_epoch(prepared: CheckedJob) -> None:
    settings = TrainingSettings(epochs=3, lr=1e-3, batch=10)
    worker = worker_of(prepared, settings)
    training, study = worker.trainer.training, prepared.folder
    folder = study.training(MERGE.key(worker.shape))
    killed = Killed(training, worker.dense, study.artifacts)
    with pytest.raises(KeyboardInterrupt):
        killed.make(MERGE, worker.calibration, lambda key: study.training(key) / CHECKPOINT)
    assert (folder / CHECKPOINT).is_file(), "where a retry of the same candidate looks"
    stamp = (folder / CHECKPOINT).stat().st_mtime_ns
    resumed = measure_recipe(worker, 7, MERGE)
    assert (folder / CHECKPOINT).stat().st_mtime_ns > stamp
    shutil.rmtree(folder)
    straight = measure_recipe(worker, 8, MERGE)
    assert resumed.resolved == straight.resolved, "the same weights, to the bit"
    assert resumed.bits == straight.bits


def test_a_non_finite_loss_fails_the_trial(prepared: CheckedJob) -> None:
    worker = worker_of(prepared, TrainingSettings(epochs=1, lr=1e30, batch=10))
    with pytest.raises(FloatingPointError):
        measure_recipe(worker, 1, MERGE)


def test_a_study_in_bfloat16_trains_in_float32(prepared: CheckedJob) -> None:
    worker = worker_of(prepared, TrainingSettings(epochs=1, lr=1e-3, batch=10), dtype="bfloat16")
    result = measure_recipe(worker, 1, MERGE)
    state = prepared.folder.artifacts.load(str(result.rebuilt_from.to_recipe().weights))
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert next(worker.build(result.rebuilt_from.to_recipe()).parameters()).dtype == torch.bfloat16


def test_a_failed_preparation_stops_the_study(
    tmp_path: Path, data: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    config = job(tmp_path, data, cache, methods="nvit", lr=10.0, space={"nvit.cost": [0.2, 0.9]},
                 prepare_epochs=400, train_batch=30)  # fmt: skip
    prepared = check_job(config)
    with torch.no_grad():  # weights that overflow once they are trained at all
        for p in prepared.model.dense.parameters():
            p.mul_(1e12)
    with refused("out-of-range", UserError, method="nvit"):
        run_study(prepared, cpus=capacity.cpus, gpus=capacity.gpus)
    assert prepared.folder.trials.all() == []


def test_targets_are_fractions_of_a_latency_table(tmp_path: Path, data: Path, cache: Path) -> None:
    dense = load_model("digits")
    # a batch in which the work counts, not the call: a busy machine may make one call take any time
    table = measure_latency_table(
        dense, "digits", batch=32, device="cpu", dtype=torch.float32, points=2, rounds=9
    )
    table.save(tmp_path / "p.json")
    profile = str(tmp_path / "p.json")
    config = job(tmp_path, data, cache, methods="nvit", profile=profile, latency_batch=32)
    prepared = check_job(config)
    assert prepared.identity["profile"] == table.digest
    worker = Worker.open(study_task(prepared, threads=None))
    outcome = worker.trainer.prepare("nvit").outcome
    assert isinstance(outcome, TrajectorySnapshots)
    cost = table.cost(65)
    whole = cost(model_widths(dense))
    assert [s.target for s in outcome.snapshots] == [0.9, 0.85]
    for snapshot in outcome.snapshots:
        share = cost(snapshot.widths) / whole
        assert share == pytest.approx(snapshot.reached) and share <= snapshot.target
    with pytest.raises(UserError):
        prepared.folder.identity.settle(prepared.identity)
        prepared.folder.journal.touch()
        check_job(replace(config, profile=None))


# --- without images to train on


def test_methods_that_need_training_require_a_train_split(
    tmp_path: Path, data: Path, cache: Path
) -> None:
    only = tmp_path / "only"
    shutil.copytree(data / "val", only)
    prepared = check_job(job(tmp_path, only, cache, methods="", space={}))
    trained = {n for n in methods.names() if epochs_key(n)}
    assert not trained & set(prepared.space.methods)
    assert set(prepared.left_out) == trained
    assert str(only) in prepared.left_out["nvit"]
    with refused("missing", UserError, key="methods", got="nvit"):
        check_job(job(tmp_path, only, cache, name="t", methods="topk,nvit", space={}))


def test_an_unused_latency_table_is_refused(tmp_path: Path, data: Path, cache: Path) -> None:
    given = {"methods": "topk", "space": {}, "profile": str(tmp_path / "p.json")}
    with refused("conflict", UserError, key="profile", accepted=["nvit"]):
        check_job(job(tmp_path, data, cache, **given))
    with pytest.raises(UserError):
        check_job(job(tmp_path, data, cache, profile=str(tmp_path / "p.json")))


# --- recovery


@pytest.fixture(scope="module")
def recovered(
    study: Study, capacity: ClusterCapacity, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StudyFolder, list[tuple[TrialResult, TrialResult]]]:
    """A copy of the study with three of its trials recovered."""
    folder = StudyFolder(tmp_path_factory.mktemp("recovered") / "s")
    shutil.copytree(study.folder.folder, folder.folder)
    pairs: list[tuple[TrialResult, TrialResult]] = []
    two = next(r.trial for r in study.of("nvit") if "+" in r.method)
    wanted = [0, two, study.of("patchmerger")[0].trial]
    recovery = Recovery.of(folder, epochs=2, trials=wanted, batch=15, cache=str(cache))
    recovery.run(
        cpus=capacity.cpus,
        gpus=capacity.gpus,
        on_result=lambda a, b: pairs.append((a, b)),
    )
    return folder, pairs


def test_a_recovered_trial_keeps_its_number_and_the_first_result(
    recovered: tuple[StudyFolder, list[tuple[TrialResult, TrialResult]]], study: Study
) -> None:
    folder, pairs = recovered
    results = {r.trial: r for r in folder.recovery.results()}
    assert len(results) == 3 and {a.trial for _, a in pairs} == set(results)
    assert folder.trials.all() == study.folder.trials.all(), "the first front is as it was"
    for before, after in pairs:
        assert after == results[before.trial]
        assert after.recipe == before.recipe and after.values["gmacs"] == before.values["gmacs"]
        was, now = (r.rebuilt_from.to_recipe() for r in (before, after))
        assert now == replace(was, weights=now.weights) and now.weights != was.weights
        assert folder.artifacts.has(str(now.weights))
        said = after.provenance.recovery
        assert said.from_top1 == before.values["top1"] and said.settings.epochs == 2
    assert not list((folder.folder / "recovered" / "training").glob("*"))


def test_a_recovery_is_written_once_with_one_set_of_settings(
    recovered: tuple[StudyFolder, list[tuple[TrialResult, TrialResult]]],
    cache: Path,
    capacity: ClusterCapacity,
) -> None:
    folder, pairs = recovered
    again = Recovery.of(folder, epochs=2, trials=[a.trial for _, a in pairs], cache=str(cache))
    assert again.pending == (), "batch and lr are those it was begun with"
    assert (
        again.run(cpus=capacity.cpus, gpus=capacity.gpus, on_result=print)
        == folder.recovery.results()
    )
    others: list[tuple[dict[str, Any], set[str]]] = [
        ({"epochs": 3}, {"epochs"}), ({"epochs": 2, "lr": 0.1}, {"lr"}),
    ]  # fmt: skip
    for change, differs in others:
        with refused("mismatch", UserError) as caught:
            Recovery.of(folder, cache=str(cache), **change)
        assert set(caught.value.details["differences"]) == differs
    with refused("not-found", UserError, trial=99):
        Recovery.of(folder, epochs=2, trials=[99], cache=str(cache))


def test_an_interrupted_recovery_continues(
    recovered: tuple[StudyFolder, list[tuple[TrialResult, TrialResult]]],
    tmp_path: Path,
    cache: Path,
    capacity: ClusterCapacity,
) -> None:
    """As after a kill: one result is missing, and its training had come to its first epoch."""
    folder, pairs = recovered
    copy = StudyFolder(tmp_path / "s")
    shutil.copytree(folder.folder, copy.folder)
    after = next(a for _, a in pairs if a.method == "patchmerger")
    (copy.folder / "recovered" / f"{after.trial:06d}.json").unlink()
    recovery = Recovery.of(copy, epochs=2, trials=[after.trial], cache=str(cache))
    assert [r.trial for r in recovery.pending] == [after.trial]
    task = study_task(recovery.job)
    training = training_for(recovery.job, recovery.settings)
    worker = Worker.open(replace(task, training=training))
    before = recovery.pending[0].rebuilt_from.to_recipe()
    model = before.build(worker.dense, weights=copy.artifacts.load(str(before.weights)))
    state = copy.folder / "recovered" / "training" / f"{after.trial:06d}" / CHECKPOINT
    killed = Killed(training, worker.dense, copy.artifacts)
    with pytest.raises(KeyboardInterrupt):
        killed.fit(model, recovery.settings, before, state)
    recovery.run(cpus=capacity.cpus, gpus=capacity.gpus, on_result=lambda *_: None)
    found = next(r for r in copy.recovery.results() if r.trial == after.trial)
    assert found.resolved == after.resolved and found.bits == after.bits


def test_a_failed_recovery_names_its_trial_and_keeps_the_others(
    study: Study, tmp_path: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    copy = StudyFolder(tmp_path / "s")
    shutil.copytree(study.folder.folder, copy.folder)
    lost = study.of("patchmerger")[0]
    copy.artifacts.path(str(lost.rebuilt_from.to_recipe().weights)).unlink()
    recovery = Recovery.of(copy, epochs=1, trials=[0, lost.trial], batch=30, cache=str(cache))
    with pytest.raises(NotRecovered) as caught:
        recovery.run(cpus=capacity.cpus, gpus=capacity.gpus, on_result=lambda *_: None)
    assert set(caught.value.failed) == {lost.trial} and caught.value.pending == 2
    assert [r.trial for r in copy.recovery.results()] == [0]


def test_the_recovered_front_is_labelled_everywhere(
    recovered: tuple[StudyFolder, list[tuple[TrialResult, TrialResult]]],
) -> None:
    folder, _ = recovered
    healed, results = folder.recovery.results(), folder.measured()
    members = {r.trial for r in front_of(healed, objectives_named(("top1", "gmacs")))}
    rows = front_rows(healed, {}, ("top1", "gmacs"), results)
    assert {r.trial for r in rows} == members and all(r.recovered for r in rows)
    top1 = {r.trial: r.values["top1"] for r in results}
    for row in rows:
        assert row.top1_before == top1[row.trial]
        assert row.top1_change == row.top1 - top1[0], "beside the study's own dense model"
    specs = {s.trial: s for s in trial_runs(
        results, study="s", objectives=("top1", "gmacs"), recovered=healed
    )}  # fmt: skip
    for trial, spec in specs.items():
        known = trial in {r.trial for r in healed}
        assert spec.tags.get("recovered") == ("finished" if known else None)
        assert spec.tags.get("recovered_pareto") == (
            None if not known else "true" if trial in members else "false"
        )
        assert ("recovered_top1" in spec.metrics) == known


def test_a_recovered_trial_is_exported(
    recovered: tuple[StudyFolder, list[tuple[TrialResult, TrialResult]]],
    cache: Path,
    tmp_path: Path,
) -> None:
    folder, pairs = recovered
    number = next(a.trial for _, a in pairs if a.method == "patchmerger")
    axes = objectives_named(("top1", "gmacs"))
    chosen = choose_trial(folder.recovery.results(), axes, trial=number)
    bundle = export(folder, chosen, tmp_path / "bundle", cache=str(cache), images=8)
    said = json.loads((bundle / "result.json").read_text())
    assert said["recipe"]["weights"] == chosen.rebuilt_from.to_recipe().weights
    assert said["measured_with"]["recovery"]["epochs"] == 2
    assert (
        "Recovered after the search: 2 epochs of fine-tuning" in (bundle / "README.md").read_text()
    )


def test_nothing_to_recover(tmp_path: Path, data: Path, cache: Path) -> None:
    prepared = check_job(job(tmp_path, data, cache, methods="topk", space={}))
    prepared.folder.identity.settle(prepared.identity)
    prepared.folder.write_job(JobRequest(prepared.config.plain()))
    with refused("empty", UserError, study="s"):
        Recovery.of(prepared.folder, epochs=1, cache=str(cache))


def test_an_unprepared_target_is_refused(prepared: CheckedJob) -> None:
    worker = worker_of(prepared, TrainingSettings(epochs=1))
    with refused("not-found", method="nvit"):
        worker.trainer.base(Recipe.of("nvit", target=0.5).structure)
