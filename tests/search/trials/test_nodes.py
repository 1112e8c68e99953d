"""What nodes offer: the slot for latencies, and the device that a job's name means."""

from __future__ import annotations

import pytest

from tests.refusals import refused
from vitpareto.search.trials.nodes import LatencySlot, Node, cluster_device, latency_slot

PLAIN = Node("a" * 56, "10.0.0.1", {"CPU": 8.0, "node:10.0.0.1": 1.0, "memory": 1e9})
BOARD = Node("b" * 56, "10.0.0.2", {"CPU": 4.0, "stopwatch": 2.0})
CARD = Node("c" * 56, "10.0.0.3", {"CPU": 16.0, "GPU": 8.0, "accelerator_type:H200": 1.0})
NODES = (PLAIN, BOARD, CARD)


def test_a_slot_on_a_node_without_gpus_takes_all_its_cpus() -> None:
    assert latency_slot("stopwatch", NODES) == LatencySlot("stopwatch", 1.0, cpus=4.0)


def test_a_slot_on_a_node_with_gpus_takes_one_gpu() -> None:
    slot = latency_slot("accelerator:H200", NODES)
    assert slot == LatencySlot("accelerator_type:H200", 0.001, cpus=1.0, gpus=1.0)


@pytest.mark.parametrize("target", ["accelerator:A100", "watch", "CPU:4"])
def test_an_unknown_target_is_refused_with_the_known_ones(target: str) -> None:
    with refused("not-found", got=target, accepted=["accelerator:H200", "stopwatch"]):
        latency_slot(target, NODES)


def test_auto_means_cuda_where_a_node_has_a_gpu() -> None:
    assert cluster_device("auto", NODES) == "cuda"
    assert cluster_device("auto", [PLAIN]) == "cpu"
    assert cluster_device("cpu", NODES) == "cpu"


def test_cuda_without_a_gpu_node_is_refused() -> None:
    with refused("unavailable", key="device", got="cuda"):
        cluster_device("cuda", [PLAIN, BOARD])
