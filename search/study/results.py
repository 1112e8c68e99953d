"""The records of what is known about a trial.

Data only: it may not measure, read or write anything.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from vitpareto.methods import Recipe
from vitpareto.search.errors import BadInput, Code
from vitpareto.search.measure.latency import Latency
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe

TrialState = Literal["finished", "raced_out", "failed", "running"]


def pack_bits(correct: np.ndarray) -> str:
    """Return per-image correctness, bool [M], as base64 text: one bit per image, in order."""
    return base64.b64encode(np.packbits(np.asarray(correct, dtype=bool)).tobytes()).decode("ascii")


def unpack_bits(text: str, images: int) -> np.ndarray:
    """Return bool [images], the inverse of `pack_bits`."""
    raw = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if (images + 7) // 8 != len(raw):
        raise BadInput(
            f"the correctness of {images} images must have {(images + 7) // 8} bytes (got "
            f"{len(raw)})",
            Code.MISMATCH, images=images, got=len(raw),
        )  # fmt: skip
    return np.unpackbits(raw, count=images).astype(bool)


@dataclass(frozen=True)
class WorstClass:
    """The class with the largest loss of accuracy against the dense model.

    Attributes:
        name: of the class.
        drop: loss in points.
        images: number of images of the class.
        beyond_noise: whether such a loss in any class has a probability of 5 % at most if no class
            lost accuracy.
    """

    name: str
    drop: float
    images: int
    beyond_noise: bool


@dataclass(frozen=True)
class Certified:
    """A trial's accuracy on the held-out images, which no decision depends on.

    Attributes:
        images: number of held-out images.
        bits: their correctness, as `pack_bits` returns it.
        top1, low, high: accuracy and its interval in percent. The intervals hold for all certified
            trials of the study at once, with 95 %.
        change, change_low, change_high: paired difference from the dense model and its interval,
            in points, likewise; None for the dense model.
        lost: images that the dense model alone has right.
        gained: images that the trial alone has right.
        worst: the class with the largest loss; None for the dense model.
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

    Attributes:
        trial: number of the trial.
        state: "finished" if all search images were seen, "raced_out" if it was stopped early.
        recipe: as proposed.
        key: of the recipe as measured (`Recipe.key`).
        values: objectives by name, in the units of `objectives.OBJECTIVES`.
        resolved: the recipe with calibrated settings written into it, so that it rebuilds without
            calibration images.
        images: number of search images seen.
        bits: their correctness, as `pack_bits` returns it.
        top1_low, top1_high: 95 % interval of top-1, in percent.
        seconds: duration of the measurement.
        reason: why the trial was not measured, or not in full; else "".
        provenance: what made the result.
        latency: if it was an objective.
        ended_ms: end of the measurement, in ms since 1970.
        certified: added when a study is read (`certificates.measured`); not in result files.
    """

    trial: int
    state: TrialState
    recipe: RecordedRecipe
    key: str
    values: dict[str, float] = field(default_factory=dict)
    resolved: RecordedRecipe | None = None
    images: int = 0
    bits: str = ""
    top1_low: float | None = None
    top1_high: float | None = None
    seconds: float = 0.0
    reason: str = ""
    provenance: Provenance = Provenance()
    latency: Latency | None = None
    ended_ms: int = field(default_factory=lambda: int(1e3 * time.time()))
    certified: Certified | None = None

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrialResult:
        """Return the result of a file's JSON."""
        resolved, latency = stored.get("resolved"), stored.get("latency")
        records = {
            "recipe": RecordedRecipe.from_json(stored["recipe"]),
            "resolved": None if resolved is None else RecordedRecipe.from_json(resolved),
            "provenance": Provenance.from_json(stored.get("provenance", {})),
            "latency": None if latency is None else Latency.from_json(latency),
        }
        return cls(**{**stored, **records})

    def to_json(self) -> dict[str, Any]:
        """Return the result for a file."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "recipe": self.recipe.to_json(),
            "resolved": None if self.resolved is None else self.resolved.to_json(),
            "provenance": self.provenance.to_json(),
            "latency": None if self.latency is None else self.latency.to_json(),
            "certified": None if self.certified is None else asdict(self.certified),
        }

    @property
    def begun_ms(self) -> int:
        """Start of the measurement, in ms since 1970."""
        return self.ended_ms - int(1e3 * self.seconds)

    @property
    def rebuilt_from(self) -> RecordedRecipe:
        """The recipe that rebuilds the candidate: with calibrated settings, if there are any."""
        return self.recipe if self.resolved is None else self.resolved

    @property
    def method(self) -> str:
        """The methods' names, the structural one first, such as `nvit+topk`; or "dense"."""
        return self.recipe.method

    @property
    def is_reference(self) -> bool:
        """Whether this is the dense model."""
        return self.method == Recipe().method
