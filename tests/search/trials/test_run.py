"""Whole studies on a real Ray with the embedded model and images: start, continue, refuse, fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.refusals import refused
from vitpareto import methods
from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.methods import BadInput, Recipe
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import NonFiniteLogits
from vitpareto.search.measure.fvcore_macs import fvcore_macs
from vitpareto.search.models.loading import load_model
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.results import unpack_bits
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.single_measurement import measure_once
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

IMAGES = 60


def job(tmp_path: Path, cache: Path, **changed: Any) -> SearchConfig:
    given = {"name": "s", "trials": 8, "images": IMAGES, "store": str(tmp_path),
             "cache": str(cache), "workers": 2, "device": "cpu", "race": "off",
             "certify": "off"}  # fmt: skip
    return SearchConfig.of({**given, **changed})


def search(config: SearchConfig, capacity: ClusterCapacity, **more: Any) -> tuple[StudyFolder, Any]:
    """One CPU for each worker: threads of tiny models wait for each other on a busy machine."""
    cpus = min(capacity.cpus, config.workers or capacity.cpus)
    outcome = run_study(check_job(config), cpus=cpus, gpus=capacity.gpus, **more)
    return outcome.folder, outcome.progress


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, capacity: ClusterCapacity
) -> tuple[StudyFolder, Any, list[Any]]:
    """One study of 22 trials over every method, for the tests that only look at it."""
    told: list[Any] = []
    config = job(tmp_path_factory.mktemp("store"), cache, trials=22)
    folder, tally = search(config, capacity, hooks=[lambda r, t: told.append(r)])
    return folder, tally, told


def test_every_trial_is_finished_and_on_disk(study: tuple[StudyFolder, Any, list[Any]]) -> None:
    folder, tally, told = study
    results = folder.trials.all()
    assert [r.state for r in results] == ["finished"] * 22, [r.reason for r in results]
    assert tally.finished == 22 and tally.ended == "22 trials measured"
    assert sorted(r.trial for r in told if r is not None) == [r.trial for r in results]
    tried = {r.method for r in results}
    assert tried == {n for n in methods.names() if methods.get(n).training != "required"}


def test_results_record_their_provenance(study: tuple[StudyFolder, Any, list[Any]]) -> None:
    folder, _, _ = study
    for result in folder.trials.all():
        assert result.images == IMAGES
        bits = unpack_bits(result.bits, result.images)
        assert result.values["top1"] == pytest.approx(100 * bits.mean())
        assert result.top1_low is not None and result.top1_high is not None
        assert result.top1_low <= result.values["top1"] <= result.top1_high
        assert result.provenance.device == "cpu" and result.provenance.dtype == "float32"
        assert result.provenance.versions["torch"] == torch.__version__
        assert len(result.provenance.data_fingerprint) == 64
        assert set(result.values) >= {"top1", "top5", "gmacs", "params_m", "peak_mb"}


def test_a_trial_equals_a_measurement_without_search_code(
    study: tuple[StudyFolder, Any, list[Any]], cache: Path
) -> None:
    """Second implementation: timm model, prune, one plain loop; no search code in between."""
    folder, _, _ = study
    from vitpareto.search.data import embedded_images

    model = load_model("digits")
    raw, labels = embedded_images.draw("search")
    images = Preprocess.of(model).normalise(torch.from_numpy(raw[:IMAGES]))
    for result in folder.trials.all():
        assert result.resolved is not None
        pruned = result.resolved.to_recipe().build(model)
        with torch.inference_mode():
            right = (pruned(images).argmax(dim=1).numpy() == labels[:IMAGES]).astype(bool)
        # other thread counts and batches may flip a near-tied image
        flipped = int(np.sum(right != unpack_bits(result.bits, IMAGES)))
        assert flipped <= 1, (str(result.recipe), flipped)
        # where images decide, a batch costs its padding too: those of the study, one by one
        adaptive = "gmacs_mean" in result.values
        parts = images.split(folder.job().keys["batch"]) if adaptive else (images[:2],)
        macs = sum(fvcore_macs(pruned, part) * len(part) for part in parts)
        found = macs / sum(len(part) for part in parts) / 1e9
        assert found == pytest.approx(result.values["gmacs"], rel=1e-3)


def test_the_front_has_latencies_on_a_named_target(
    study: tuple[StudyFolder, Any, list[Any]],
) -> None:
    folder, tally, _ = study
    front = front_of(folder.trials.all(), [OBJECTIVES["top1"], OBJECTIVES["gmacs"]])
    latencies = folder.latencies.read()
    assert {r.trial for r in front} == set(latencies) == set(tally.front)
    for timed in latencies.values():
        assert timed.rounds >= 30
        assert timed.target.device == "cpu" and timed.target.batch == 1
        assert 0 < timed.p50_ms <= timed.p95_ms
        assert timed.speedup_low <= timed.speedup <= timed.speedup_high
    merged = {r.trial: r.values for r in folder.measured()}
    assert all("latency_ms" in merged[t] for t in latencies)


def test_continuing_a_study_measures_nothing_twice(
    study: tuple[StudyFolder, Any, list[Any]], capacity: ClusterCapacity, cache: Path
) -> None:
    folder, _, _ = study
    before = {p: p.stat().st_mtime_ns for p in (folder.folder / "trials").iterdir()}
    config = job(folder.folder.parent, cache, trials=22, workers=1)
    _, tally = search(config, capacity)
    assert {p: p.stat().st_mtime_ns for p in (folder.folder / "trials").iterdir()} == before
    _, tally = search(replace(config, trials=24), capacity)
    assert tally.finished == 24
    keys = [r.key for r in folder.trials.all() if not r.reason]
    assert len(keys) == len(set(keys))


def test_a_study_refuses_other_settings(
    study: tuple[StudyFolder, Any, list[Any]], cache: Path, capacity: ClusterCapacity
) -> None:
    folder, _, _ = study
    store = folder.folder.parent
    before = sorted(p.name for p in (folder.folder / "trials").iterdir())
    for change in ({"dtype": "bfloat16"}, {"images": 50}, {"seed": 1}, {"methods": "tome"}):
        config = job(store, cache, **{"trials": 30, **change})
        with refused("mismatch", UserError) as caught:
            search(config, capacity)
        # other images have another fingerprint too
        assert set(caught.value.details["differences"]) - {"data_fingerprint"} == change.keys()
    assert sorted(p.name for p in (folder.folder / "trials").iterdir()) == before


def test_all_trials_but_dense_are_inside_the_budget_window(
    tmp_path: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    dense = methods.model_shape(load_model("digits"))
    gmacs = dense.macs(dense.dense_counts(), "mid-block") / 1e9
    low, high = 0.4 * gmacs, 0.7 * gmacs
    config = job(
        tmp_path, cache, trials=12, min_gmacs=low, max_gmacs=high, latency="off", workers=1
    )
    folder, tally = search(config, capacity)
    results = folder.trials.all()
    assert results[0].is_reference and len(results) == 12
    assert all(low <= r.values["gmacs"] <= high for r in results[1:])
    assert tally.outside > 0
    assert not folder.latencies.read()


def test_an_unreachable_budget_window_is_refused(tmp_path: Path, cache: Path) -> None:
    with refused("empty", low=None, high=1e-6):
        check_job(job(tmp_path, cache, max_gmacs=1e-6))
    assert not (tmp_path / "s").exists()


def test_an_empty_study_accepts_other_settings(tmp_path: Path, cache: Path) -> None:
    """A refused start must not hold the name against the mended job."""
    first = check_job(job(tmp_path, cache, seed=1))
    first.folder.identity.settle(first.identity)
    again = check_job(job(tmp_path, cache, seed=2))
    again.folder.identity.settle(again.identity)
    assert again.folder.identity.read()["seed"] == 2


def test_three_objectives(tmp_path: Path, cache: Path, capacity: ClusterCapacity) -> None:
    config = job(
        tmp_path, cache, objectives="top1,gmacs,params_m", methods="resize,topk", latency="off",
        workers=1,
    )  # fmt: skip
    folder, tally = search(config, capacity)
    axes = [OBJECTIVES[o] for o in ("top1", "gmacs", "params_m")]
    assert {r.trial for r in front_of(folder.trials.all(), axes)} == set(tally.front)
    assert tally.hypervolume > 0, "token methods keep the parameters: over three axes it were 0"


def test_latency_as_an_objective_uses_one_worker(
    tmp_path: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    config = job(tmp_path, cache, objectives="top1,latency_ms", trials=3, methods="topk")
    assert TrialResources.of(config, "cpu", 8, 0) == TrialResources(workers=1, cpus=8, gpus=0.0)
    folder, _ = search(replace(config, latency="off", workers=1), capacity)
    for result in folder.trials.all():
        assert result.values["latency_ms"] > 0
        assert result.latency is not None and result.latency.target.runtime == "eager"
        if result.trial:
            # the dense model's p50 over the trial's own ratio: free of the machine's drift
            base = folder.trials.all()[0].latency
            assert base is not None
            assert result.values["latency_ms"] == base.p50_ms / result.latency.speedup


def test_a_recipe_that_raises_is_a_failed_trial_with_its_reason(
    tmp_path: Path, cache: Path
) -> None:
    config = job(tmp_path, cache, workers=1)
    prepared = check_job(config)
    worker = Worker.open(study_task(prepared, threads=None))
    with torch.no_grad():
        next(worker.dense.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLogits):
        measure_recipe(worker, 1, Recipe.of("topk", keep_rate=0.5))


def test_two_settings_with_the_same_counts_are_measured_once(tmp_path: Path, cache: Path) -> None:
    prepared = check_job(job(tmp_path, cache))
    worker = Worker.open(study_task(prepared, threads=None))
    first = measure_recipe(worker, 1, Recipe.of("rajni", gamma=0.05, min_tokens=8))
    prepared.folder.trials.write(first)
    again = measure_recipe(worker, 2, Recipe.of("rajni", gamma=0.0500001, min_tokens=8))
    assert again.key == first.key and again.reason == "the same candidate as trial 1"
    assert again.values == first.values and again.bits == first.bits


def test_a_single_measurement_needs_no_study(tmp_path: Path, cache: Path) -> None:
    config = SearchConfig.of({"images": 30, "cache": str(cache), "store": str(tmp_path / "no")})
    recipe = Recipe.from_yaml("tokens: {method: rajni, gamma: 0.02, min_tokens: 8}")
    measured = measure_once(config, recipe)
    result, dense, timed = measured.result, measured.dense, measured.latency
    assert len(result.rebuilt_from.to_json()["tokens"]["counts"]) == 12
    assert result.values["gmacs"] < dense.values["gmacs"]
    assert timed.rounds >= 30
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "tokens",
    [
        "{method: patchmerger, prune_layers: [3], num_tokens: 20}",
        "{method: dynamicvit, prune_layers: [3], keep_rates: [0.5]}",
        "{method: tnt, prune_layers: [2], keep_rates: [0.6]}",
        "{method: topk, keep_rate: 0.5, prune_layers: [12]}",
        "{method: evit, counts: [64, 32]}",
    ],
)
def test_measure_refuses_a_recipe_before_any_image_is_read(
    tmp_path: Path, cache: Path, tokens: str
) -> None:
    """Fresh weights have no accuracy to measure. The data does not exist and would raise next."""
    config = SearchConfig.of({"data": "/nowhere/val", "cache": str(cache), "store": str(tmp_path)})
    with pytest.raises(BadInput) as caught:
        measure_once(config, Recipe.from_yaml(f"tokens: {tokens}"))
    message = str(caught.value)
    assert "/nowhere" not in message and "\n" not in message


def test_a_single_measurement_accepts_a_recipe_without_trained_parts(
    tmp_path: Path, cache: Path
) -> None:
    """DynamicViT that drops nothing is the dense model, and needs no weights."""
    config = SearchConfig.of({"images": 20, "cache": str(cache), "store": str(tmp_path)})
    recipe = Recipe.from_yaml("tokens: {method: dynamicvit, prune_layers: [], keep_rates: []}")
    measured = measure_once(config, recipe)
    result, dense = measured.result, measured.dense
    assert result.values["top1"] == dense.values["top1"]
    assert result.values["gmacs"] == dense.values["gmacs"]


def test_a_missing_device_is_refused(tmp_path: Path, cache: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with refused("unavailable", key="device", got="cuda", devices=0):
        check_job(job(tmp_path, cache, device="cuda"))
    config = job(tmp_path, cache, gpus_per_trial=2.0)
    with refused("out-of-range", key="gpus_per_trial", got=2.0, accepted=1):
        TrialResources.of(config, "cuda", 8, 1)
    assert (
        TrialResources.of(replace(config, gpus_per_trial=0.25, workers=None), "cuda", 16, 2).workers
        == 8
    )


def test_job_and_identity_are_readable_files(
    study: tuple[StudyFolder, Any, list[Any]],
) -> None:
    folder, _, _ = study
    assert folder.job().model == "digits"
    identity = json.loads((folder.folder / "study.json").read_text())
    assert identity["schema"] == 1 and identity["dtype"] == "float32"
