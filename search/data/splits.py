"""The order of a study's images and their three splits: by hash, the same everywhere.

Nothing here reads a file or knows where images come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vitpareto.search.data.decoding import Source
from vitpareto.search.errors import UserError

#: Decisions are made on search, certified on held-out; calibration is what methods may look at.
EVALUATION = ("calibration", "search", "held-out")
CALIBRATION_IMAGES, CALIBRATION_FROM = 1024, 5000


class Listed(Source, Protocol):
    """A split before it is decoded."""

    def stamp(self) -> str:
        """Changes when the images, their labels or their order change; not where they lie."""

    def first(self, images: int) -> Listed:
        """The same split, cut to a prefix."""

    def __len__(self) -> int: ...


def stratified_order(keys: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """A shuffled order whose every prefix is nearly balanced by class: positions, int64 [M].

    Within a class the keys are shuffled; the image of rank r among the n of its class is placed
    at (r + u) / n, u uniform in [0, 1). At any such place t, each class has given t * n images
    to within one. Shuffled by hash, not by a generator: the same with every version of every
    library, and a new image leaves the order of the others as it was.
    """
    draws = np.empty((len(keys), 2), dtype=np.uint64)
    for i, key in enumerate(keys):
        digest = hashlib.blake2b(f"{seed}/{key}".encode(errors="surrogateescape"), digest_size=16)
        draws[i] = np.frombuffer(digest.digest(), dtype="<u8")
    shuffled = np.lexsort((draws[:, 0], labels))
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(keys))
    rank[shuffled] = np.arange(len(keys)) - starts[labels[shuffled]]
    place = (rank + draws[:, 1] / 2.0**64) / counts[labels]
    return np.lexsort((draws[:, 0], place))


def divide(keys: Sequence[str], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Calibration, search and held-out out of one set: disjoint positions, each in its order.

    Raises `UserError` where there are too few images for three splits.
    """
    total = len(keys)
    if total < 5:
        raise UserError(f"three splits need at least 5 images, got {total}")
    calibration = CALIBRATION_IMAGES if total >= CALIBRATION_FROM else total // 5
    order = stratified_order(keys, labels, seed)
    ends = (calibration, calibration + total // 5)
    splits = {}
    for name, members in zip(EVALUATION, np.split(order, ends), strict=True):
        own = stratified_order([f"{name}/{keys[i]}" for i in members], labels[members], seed)
        splits[name] = members[own]
    return splits
