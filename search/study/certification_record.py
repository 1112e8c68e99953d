"""Which images and trials are certified, and the error that each trial's interval may have.

Data only: it may not measure, read or write anything.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitpareto.search.stats.intervals import errors_by_round

#: Probability that any interval misses: of the accuracies, and of the differences from dense.
ERROR = 0.05


@dataclass(frozen=True, eq=False)
class CertificationRecord:
    """Which images and trials are certified.

    Attributes:
        fingerprint: of the decoded held-out split.
        classes: its class names.
        labels: int [M], the images' labels.
        rounds: trial numbers by round.
    """

    fingerprint: str
    classes: tuple[str, ...]
    labels: np.ndarray
    rounds: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> CertificationRecord:
        """The record of a file's JSON."""
        labels = np.frombuffer(base64.b64decode(stored["labels"]), dtype="<u2").astype(np.int64)
        rounds = tuple(tuple(trials) for trials in stored["rounds"])
        return cls(stored["fingerprint"], tuple(stored["classes"]), labels, rounds)

    def to_json(self) -> dict[str, Any]:
        """The record for a file."""
        labels = base64.b64encode(self.labels.astype("<u2").tobytes()).decode("ascii")
        return {
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "labels": labels,
            "rounds": [list(trials) for trials in self.rounds],
        }

    def errors(self) -> dict[int, float]:
        """Return the error of each trial's interval."""
        each = errors_by_round([len(trials) for trials in self.rounds], ERROR)
        return {t: error for trials, error in zip(self.rounds, each, strict=True) for t in trials}
