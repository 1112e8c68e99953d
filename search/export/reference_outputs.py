"""The measured model's outputs on the verification images, and the comparison of other logits.

Arithmetic and `verify.npz` only: nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

#: Largest accepted logit difference, relative to the measured model's largest logit. Float32
#: rounding through 12 blocks is at most 2e-6 of it; a mean exported as a sum gives 1e-2 and more.
TOLERANCE = 1e-4
#: Share of the images that may differ by a near-tied selection (at least one image may).
MAX_NEAR_TIED = 0.05


@dataclass(frozen=True)
class ReferenceOutputs:
    """The measured model on M verification images, as stored in `verify.npz`.

    Attributes:
        images: uint8 [M, H, W, 3].
        labels: int64 [M].
        logits: [M, K].
        other_logits: [R, M, K], of the same model with rounding-sized noise on its input.
        other_selection: bool [R, M], whether the model then selected other patches.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    logits: Floats
    other_logits: Floats
    other_selection: NDArray[np.bool_]

    @classmethod
    def load(cls, path: Path) -> ReferenceOutputs:
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in cls.__dataclass_fields__})

    def save(self, path: Path) -> None:
        np.savez_compressed(path, allow_pickle=False, **self.__dict__)

    def first(self, count: int) -> ReferenceOutputs:
        """The outputs on the first `count` images."""
        return ReferenceOutputs(
            self.images[:count], self.labels[:count], self.logits[:count],
            self.other_logits[:, :count], self.other_selection[:, :count],
        )  # fmt: skip

    @property
    def tolerance(self) -> float:
        """In logits."""
        return TOLERANCE * max(1.0, float(np.abs(self.logits).max()))


@dataclass(frozen=True)
class Comparison:
    """A runtime at a batch size against the measured model, over all verification images.

    Attributes:
        max_difference: largest absolute logit difference over images that are not near-tied.
        same_class: images with the measured model's prediction.
        near_tied: images that differ by a near-tied selection (see `compare`).
        wrong: images that differ in another way.
    """

    runtime: str
    batch: int
    images: int
    max_difference: float
    same_class: int
    near_tied: int
    wrong: int

    @property
    def passed(self) -> bool:
        few = self.near_tied <= max(1, int(MAX_NEAR_TIED * self.images))
        return self.wrong == 0 and few and self.same_class >= self.images - self.near_tied


def compare(reference: ReferenceOutputs, logits: Floats, runtime: str, batch: int) -> Comparison:
    """Count agreeing, near-tied and wrong images.

    An image agrees if all its logits are within the tolerance of the measured model's. An image
    that does not agree is near-tied, not wrong, if both conditions hold:

    1. The measured model itself, in eager mode, selected other patches for it when its input was
       changed by rounding-sized noise (a relative 1e-6 or 1e-5).
    2. The runtime's logits are within the tolerance of such a run's.

    A near-tied image therefore still equals a result of the measured model, and at most 5 % of the
    images (or one) may be near-tied, so that a wrong export cannot pass.

    Args:
        logits: [M, K], of the runtime at this batch size.
    """
    limit = reference.tolerance
    # NaN compares false with everything, so it counts as an infinite difference
    difference = np.nan_to_num(np.abs(logits - reference.logits).max(axis=1), nan=np.inf)
    agrees = difference <= limit
    equals_other = np.abs(logits[None] - reference.other_logits).max(axis=2) <= limit
    near_tied = ~agrees & (equals_other & reference.other_selection).any(axis=0)
    same_class = logits.argmax(axis=1) == reference.logits.argmax(axis=1)
    return Comparison(
        runtime=runtime,
        batch=batch,
        images=len(logits),
        max_difference=float(difference[~near_tied].max(initial=0.0)),
        same_class=int(same_class.sum()),
        near_tied=int(near_tied.sum()),
        wrong=int((~agrees & ~near_tied).sum()),
    )
