"""The records of a measured latency and of the target that it holds for.

Data only: this module may not import torch or another room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatencyTarget:
    """What a latency holds for.

    `device` is the GPU's name or "cpu", `batch` the images per call, `threads` the number of CPU
    threads (None on a GPU).
    """

    device: str
    runtime: str
    dtype: str
    batch: int
    threads: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As stored in a study, a bundle or a latency table; `threads` only where it is set."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> LatencyTarget:
        """The inverse of `to_json`. Raises KeyError for a missing key."""
        threads = stored.get("threads")
        return cls(
            device=str(stored["device"]),
            runtime=str(stored["runtime"]),
            dtype=str(stored["dtype"]),
            batch=int(stored["batch"]),
            threads=None if threads is None else int(threads),
        )

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.to_json().items())


@dataclass(frozen=True)
class Latency:
    """A candidate and the dense model timed in alternation on one target.

    `p50_ms`, `p95_ms` and `dense_p50_ms` are milliseconds per batch. `speedup` is dense over
    candidate; `speedup_low` and `speedup_high` are its 95 % interval over `rounds` rounds.
    """

    p50_ms: float
    p95_ms: float
    dense_p50_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    rounds: int
    target: LatencyTarget

    @property
    def images_per_s(self) -> float:
        """Throughput of the candidate."""
        return 1e3 * self.target.batch / self.p50_ms

    def to_json(self) -> dict[str, Any]:
        """As stored in a study or a bundle."""
        return {**vars(self), "target": self.target.to_json()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Latency:
        """The inverse of `to_json`. Raises KeyError or TypeError for another set of keys."""
        return cls(**{**stored, "target": LatencyTarget.from_json(stored["target"])})
