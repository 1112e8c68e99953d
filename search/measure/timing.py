"""Latency of a candidate beside the dense model on one target.

A latency is measured with nothing else running on its device; the caller makes sure of that.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpareto.methods import BadInput, Code
from vitpareto.search.measure.device import device_name
from vitpareto.search.measure.latency import Latency, LatencyTarget


@dataclass(frozen=True)
class Clock:
    """Times one call in milliseconds: CUDA events on GPUs, the wall clock elsewhere."""

    cuda: bool

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


def measure_latency(
    candidate: Callable[[Tensor], Any],
    dense: Callable[[Tensor], Any],
    images: Tensor,
    rounds: int = 30,
    warmup: int = 5,
    runtime: str = "eager",
) -> Latency:
    """Time candidate and dense model in alternation, in `torch.inference_mode`.

    Each round times both and the order alternates, so that a drift of the machine affects both
    alike. The speed-up is the median of the rounds' ratios dense / candidate, with its 95 %
    interval.

    Args:
        candidate: a call on a batch, as `search.runtimes.backends.runtime_call` returns it.
        dense: the dense model in the same runtime.
        images: the batch, [B, 3, H, W], on the device to measure.
        rounds: timed rounds.
        warmup: untimed calls of each before the first round.
        runtime: name of the runtime of both, for the target.

    Raises:
        BadInput: `rounds` is below 1.
    """
    if rounds < 1:
        raise BadInput(
            f"rounds must be at least 1 (got {rounds})",
            Code.OUT_OF_RANGE,
            name="rounds",
            got=rounds,
        )
    candidate_ms, dense_ms = _alternate(candidate, dense, images, rounds, warmup)
    ratio = dense_ms / candidate_ms
    low, high = median_interval(ratio)
    return Latency(
        p50_ms=float(np.median(candidate_ms)),
        p95_ms=float(np.quantile(candidate_ms, 0.95)),
        dense_p50_ms=float(np.median(dense_ms)),
        speedup=float(np.median(ratio)),
        speedup_low=low,
        speedup_high=high,
        rounds=rounds,
        target=batch_target(images, runtime),
    )


def _alternate(
    candidate: Callable[[Tensor], Any],
    dense: Callable[[Tensor], Any],
    images: Tensor,
    rounds: int,
    warmup: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Milliseconds of each round: of the candidate and of the dense model, [rounds] each."""
    clock = Clock(images.is_cuda)
    candidate_ms, dense_ms = np.zeros(rounds), np.zeros(rounds)
    # CUDA events are recorded on the current device, which may not be the images'
    device = torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext()
    with torch.inference_mode(), device:
        for _ in range(warmup):
            candidate(images)
            dense(images)
        for i in range(rounds):
            if i % 2:
                dense_ms[i] = clock(lambda: dense(images))
                candidate_ms[i] = clock(lambda: candidate(images))
            else:
                candidate_ms[i] = clock(lambda: candidate(images))
                dense_ms[i] = clock(lambda: dense(images))
    return candidate_ms, dense_ms


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % confidence interval of the median from order statistics.

    The narrowest symmetric interval whose exact binomial coverage is at least 95 %. Below 6 values
    no such interval exists and the range of the values is returned.
    """
    ordered, n = np.sort(values), len(values)
    # leave out the k-th value from each end while P(Binomial(n, 1/2) <= k) is at most 2.5 %;
    # `outcomes` / 2^n is that probability
    left_out, outcomes = 0, 1
    while 40 * (outcomes := outcomes + math.comb(n, left_out + 1)) <= 2**n:
        left_out += 1
    return float(ordered[left_out]), float(ordered[n - 1 - left_out])


def batch_target(images: Tensor, runtime: str = "eager") -> LatencyTarget:
    """The target of a latency measured on the batch `images` in this process."""
    return LatencyTarget(
        device=device_name(images.device),
        runtime=runtime,
        dtype=str(images.dtype).removeprefix("torch."),
        batch=images.shape[0],
        threads=None if images.is_cuda else torch.get_num_threads(),
    )
