"""The record of a timed candidate.

Data only: it may not import torch or any other room.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Latency:
    """A candidate and the dense model timed in alternation on one device.

    `p50_ms`, `p95_ms` and `dense_p50_ms` are milliseconds per batch. `speedup` is dense over
    candidate; `speedup_low` and `speedup_high` are its 95 % interval over `rounds` rounds. `target`
    names the device, its batch size and dtype, and the runtime.
    """

    p50_ms: float
    p95_ms: float
    dense_p50_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    rounds: int
    target: dict[str, Any] = field(default_factory=dict)
