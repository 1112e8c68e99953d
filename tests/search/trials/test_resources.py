"""How trials share a cluster."""

from __future__ import annotations

from typing import Any

from tests.refusals import refused
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.nodes import Node
from vitpareto.search.trials.resources import TrialResources

CPU_NODE = Node("a" * 56, "10.0.0.1", {"CPU": 4.0})
STOPWATCH = Node("b" * 56, "10.0.0.2", {"CPU": 4.0, "stopwatch": 1.0})


def config(**job: Any) -> SearchConfig:
    return SearchConfig.of(job)


def test_cpus_are_shared_by_at_most_eight_workers_per_machine() -> None:
    assert TrialResources.of(config(), "cpu", 4, 0) == TrialResources(4, 1, 0.0)
    assert TrialResources.of(config(), "cpu", 32, 0) == TrialResources(8, 4, 0.0)
    assert TrialResources.of(config(workers=2), "cpu", 4, 0) == TrialResources(2, 2, 0.0)


def test_no_trial_asks_for_more_cpus_than_a_node_has() -> None:
    nodes = (CPU_NODE, CPU_NODE)
    assert TrialResources.of(config(workers=1), "cpu", 8, 0, nodes) == TrialResources(1, 4, 0.0)


def test_gpus_are_shared_by_fractions() -> None:
    assert TrialResources.of(config(gpus_per_trial=0.25), "cuda", 16, 2).workers == 8
    assert TrialResources.of(config(gpus_per_trial=0.25), "cuda", 16, 2).gpus == 0.25


def test_more_gpus_per_trial_than_the_cluster_has_are_refused() -> None:
    with refused("out-of-range", key="gpus_per_trial", got=4.0, accepted=2):
        TrialResources.of(config(gpus_per_trial=4.0), "cuda", 16, 2)


def test_latency_as_an_objective_leaves_one_worker() -> None:
    job = config(objectives=["top1", "latency_ms"])
    assert TrialResources.of(job, "cpu", 8, 0) == TrialResources(1, 8, 0.0)
    assert TrialResources.of(job, "cuda", 8, 2) == TrialResources(1, 8, 1.0)


def test_the_slot_of_latency_on_is_not_used_by_trials() -> None:
    job = config(latency_on="stopwatch")
    assert TrialResources.of(job, "cpu", 8, 0, (CPU_NODE, STOPWATCH)).workers == 4


def test_a_slot_that_leaves_nothing_for_trials_is_refused() -> None:
    with refused("unavailable", key="latency_on", got="stopwatch", cpus=0):
        TrialResources.of(config(latency_on="stopwatch"), "cpu", 4, 0, (STOPWATCH,))


def test_how_many_trials_fit_into_resources() -> None:
    assert TrialResources(8, 2, 0.5).fit({"CPU": 16.0, "GPU": 1.0}) == 2
    assert TrialResources(8, 2, 0.0).fit({"CPU": 7.0}) == 3
