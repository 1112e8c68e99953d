"""What is known about a trial, and the one table of objectives with their units and directions.

Data only: nothing here measures, reads or writes anything.
"""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vitpareto.methods import Recipe
from vitpareto.search.measure.latency import Latency

TrialState = Literal["finished", "raced_out", "failed", "running"]


def pack_bits(correct: np.ndarray) -> str:
    """Per-image correctness, bool [M], as base64 text: one bit an image, first image first."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode("ascii")


def unpack_bits(text: str, images: int) -> np.ndarray:
    """The inverse of `pack_bits`: bool [images]."""
    raw = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if (images + 7) // 8 != len(raw):
        raise ValueError(f"{len(raw)} bytes do not hold the correctness of {images} images")
    return np.unpackbits(raw, count=images).astype(bool)


@dataclass(frozen=True)
class WorstClass:
    """The class that lost most against the dense model: `drop` in points, of so many `images`.

    `beyond_noise`: such a loss in any class at all would be a surprise (5 %) if none had any.
    """

    name: str
    drop: float
    images: int
    beyond_noise: bool


@dataclass(frozen=True)
class Certified:
    """A trial on the held-out images, which no decision was made by.

    `low`, `high` (percent) hold for all certified trials of the study at once, with 95 %; so do
    `change_low`, `change_high` (points), of the paired difference from the dense model. `lost` are
    the images that the dense model has right and the trial wrong, `gained` the other way round;
    `bits` as in `TrialResult`. None, and 0, where the dense model itself is the trial.
    """

    images: int
    bits: str
    top1: float
    low: float
    high: float
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    lost: int = 0
    gained: int = 0
    worst: WorstClass | None = None


@dataclass(frozen=True)
class TrialResult:
    """One recipe measured, or the reason why it was not.

    `values` holds the objectives by name (top1 and top5 in percent, gmacs in G, params_m in M,
    peak_mb in MB); `images` is how many search images were seen, `bits` their correctness
    (`pack_bits`). `resolved` is the recipe with everything that was calibrated written into it,
    so that it rebuilds without calibration images. `latency` is a `Latency` as a dict, where it was
    an objective. `seconds` is how long it took, `ended_ms` when it was there, in ms since 1970.
    `certified` is put in when a study is read (`search.study.certificates`): a result's file has
    none.
    """

    trial: int
    state: TrialState
    recipe: dict[str, Any]
    key: str
    values: dict[str, float] = field(default_factory=dict)
    resolved: dict[str, Any] | None = None
    images: int = 0
    bits: str = ""
    top1_low: float | None = None
    top1_high: float | None = None
    seconds: float = 0.0
    reason: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] | None = None
    ended_ms: int = field(default_factory=lambda: int(1e3 * time.time()))
    certified: Certified | None = None

    @property
    def begun_ms(self) -> int:
        """When it was begun, in ms since 1970."""
        return self.ended_ms - int(1e3 * self.seconds)

    @property
    def timed(self) -> Latency | None:
        """The latency that was measured as an objective, in full."""
        return None if self.latency is None else Latency.from_json(self.latency)

    @property
    def method(self) -> str:
        """The methods' names, the structural one first: `topk`, `nvit+topk`; or "dense"."""
        parts = (self.recipe.get(part) for part in ("structure", "tokens"))
        return "+".join(str(part["method"]) for part in parts if part) or Recipe().method

    @property
    def is_reference(self) -> bool:
        return self.method == Recipe().method
