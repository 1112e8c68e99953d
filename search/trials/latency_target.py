"""What a latency of this study holds for, read on the device that trials run on."""

from __future__ import annotations

from typing import Any

import torch

from vitpareto.search.measure.accuracy import DTYPES
from vitpareto.search.measure.cost import target_of


def latency_target(batch: int, dtype: str, device: str) -> dict[str, Any]:
    """The target (`cost.target_of`) of latencies at this batch, on a node of the cluster if only
    nodes have a GPU.
    """
    if not device.startswith("cuda") or torch.cuda.is_available():
        return _target(batch, dtype, device)
    # a driver without a GPU has joined a cluster, so Ray is loaded; no other caller needs it
    from vitpareto.search.trials.ray_cluster import run_once

    return run_once(_target, batch, dtype, "cuda", cpus=0, gpus=1)


def _target(batch: int, dtype: str, device: str) -> dict[str, Any]:
    return target_of(torch.empty(batch, dtype=DTYPES[dtype], device=device))
