"""What `result.json` says about a bundle's programs besides ONNX and torch.export in float32.

Data only: nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vitpareto.search.measure.latency import Latency

#: points of top-1 that the int8 program may lose against float32 and still count as verified
MAX_INT8_LOSS = 1.0


@dataclass(frozen=True)
class SpecialisedProgram:
    """One more program of a bundle, for one runtime or one batch size.

    `verified` is true only if it was run here and its logits are the measured model's. `why` says
    what was compared, or why it was not. `runs` is the code or command that runs it.
    """

    file: str
    verified: bool
    why: str
    runs: str

    def summary(self) -> str:
        """One line."""
        return f"{self.file}: {'verified' if self.verified else 'not verified'}, {self.why}"


@dataclass(frozen=True)
class Int8Result:
    """The int8 program, measured on the search images.

    `top1`, `float_top1` and `dense_top1` are percent: of this program, of the float32 program and
    of the dense model in int8. `change` is `top1` minus `float_top1` in points, with its 95 %
    interval. `agree` counts images that both programs classify alike. `latency` is by batch, beside
    the dense model in int8; `over_float` is the speed-up over the float32 program by batch.
    """

    images: int
    calibrated_on: int
    top1: float
    float_top1: float
    dense_top1: float
    change: float
    change_low: float
    change_high: float
    agree: int
    latency: Mapping[int, Latency]
    over_float: Mapping[int, float]
    megabytes: float
    float_megabytes: float

    @property
    def verified(self) -> bool:
        """Whether at most `MAX_INT8_LOSS` points of top-1 are lost."""
        return self.change >= -MAX_INT8_LOSS

    def to_json(self) -> dict[str, Any]:
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "latency": {str(batch): timed.to_json() for batch, timed in self.latency.items()},
            "over_float": {str(batch): ratio for batch, ratio in self.over_float.items()},
            "verified": self.verified,
            "most_lost": MAX_INT8_LOSS,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Int8Result:
        values = {f.name: stored[f.name] for f in fields(cls)}
        latency = {int(k): Latency.from_json(v) for k, v in stored["latency"].items()}
        over_float = {int(k): float(v) for k, v in stored["over_float"].items()}
        return cls(**{**values, "latency": latency, "over_float": over_float})

    def summary(self) -> str:
        """One line."""
        latency = "; ".join(
            f"batch {batch}: {timed.speedup:.2f} times dense int8, "
            f"{self.over_float[batch]:.2f} times float32"
            for batch, timed in self.latency.items()
        )
        verdict = "verified" if self.verified else "NOT VERIFIED"
        return (
            f"int8 {verdict}: top-1 {self.top1:.2f} % on {self.images} search images, float32 "
            f"{self.float_top1:.2f} ({self.change:+.2f}, 95 %: {self.change_low:+.2f} to "
            f"{self.change_high:+.2f}), dense int8 {self.dense_top1:.2f}; {latency}; "
            f"{self.megabytes:.1f} MB, float32 {self.float_megabytes:.1f}"
        )
