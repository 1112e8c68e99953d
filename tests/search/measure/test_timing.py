"""Latency: rounds in alternation, the interval of the median, and what the record holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from tests.refusals import refused
from tests.search.measure.methods_measured import pruned
from tests.search.small import images, vit
from vitpareto.search.measure.device import device_name
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.measure.timing import (
    batch_target,
    measure_latency,
    median_interval,
)


@pytest.mark.parametrize("n", [1, 5, 6, 8, 9, 10, 21, 26, 30, 31, 75, 200, 501])
def test_median_interval_covers_by_the_exact_binomial_and_no_wider(n: int) -> None:
    low, high = median_interval(np.random.default_rng(n).permutation(n).astype(float))
    assert low + high == n - 1, "as many values above as below"
    left_out = int(low)

    def coverage(k: int) -> float:
        return 1 - 2 * binom.cdf(k, n, 0.5)

    if n < 6:
        assert left_out == 0, "no interval of so few holds 95 %"
        return
    assert coverage(left_out) >= 0.95
    assert coverage(left_out + 1) < 0.95


def test_median_interval_covers_by_simulation() -> None:
    rng, runs = np.random.default_rng(0), 4000
    held = 0
    for sample in rng.exponential(size=(runs, 30)):
        low, high = median_interval(sample)
        held += low <= math.log(2) <= high
    exact = 1 - 2 * binom.cdf(9, 30, 0.5)
    # four standard deviations of so many runs
    assert held / runs == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / runs))


class Logged(nn.Module):
    """Writes its name down whenever it is called."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        self.log.append(self.name)
        return x.sum()


def test_candidate_and_dense_take_turns_after_a_warm_up() -> None:
    log: list[str] = []
    found = measure_latency(Logged("c", log), Logged("d", log), images(2), rounds=4, warmup=3)
    assert "".join(log) == "cd" * 3 + "cd" + "dc" + "cd" + "dc"
    assert found.rounds == 4


def test_the_description_of_a_latency() -> None:
    found = measure_latency(pruned("tome"), vit(), images(2), rounds=8, warmup=1)
    assert 0 < found.p50_ms <= found.p95_ms and found.dense_p50_ms > 0
    assert 0 < found.speedup_low <= found.speedup <= found.speedup_high
    assert found.target == LatencyTarget("cpu", "eager", "float32", 2, torch.get_num_threads())
    assert found.images_per_s == pytest.approx(2e3 / found.p50_ms)
    assert batch_target(images(3).to(torch.bfloat16)).dtype == "bfloat16"
    assert device_name("cpu") == "cpu"


def test_a_latency_needs_a_round() -> None:
    with refused("out-of-range", name="rounds", got=0):
        measure_latency(vit(), vit(), images(1), rounds=0)


def test_a_latency_keeps_its_keys_on_disk() -> None:
    stored = {
        "p50_ms": 20.0, "p95_ms": 25.0, "dense_p50_ms": 40.0, "speedup": 2.0, "speedup_low": 1.9,
        "speedup_high": 2.1, "rounds": 30,
        "target": {"device": "NVIDIA H200", "runtime": "eager", "dtype": "float32", "batch": 64},
    }  # fmt: skip
    assert Latency.from_json(stored).to_json() == stored
    stored["target"] = {**stored["target"], "device": "cpu", "threads": 2}
    found = Latency.from_json(stored)
    assert found.to_json() == stored
    assert str(found.target) == "device cpu, runtime eager, dtype float32, batch 64, threads 2"
