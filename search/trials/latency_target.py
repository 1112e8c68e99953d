"""What a latency of this study holds for, read on the device that trials run on."""

from __future__ import annotations

import torch

from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.measure.latency import LatencyTarget
from vitpareto.search.measure.timing import batch_target


def latency_target(batch: int, dtype: str, device: str) -> LatencyTarget:
    """The target of latencies at this batch, read on a cluster node if only nodes have a GPU."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return _target(batch, dtype, device)
    # a driver without a GPU has joined a cluster, so Ray is loaded; no other caller needs it
    from vitpareto.search.trials.node_checks import check_code
    from vitpareto.search.trials.ray_cluster import run_once

    check_code()
    return run_once(_target, batch, dtype, "cuda", cpus=0, gpus=1)


def _target(batch: int, dtype: str, device: str) -> LatencyTarget:
    return batch_target(torch.empty(batch, dtype=DTYPES[dtype], device=device))
