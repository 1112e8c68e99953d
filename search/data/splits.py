"""The order of a study's images and their three splits: by hash, the same on every machine.

Nothing here reads a file or knows where images come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from vitpareto.search.errors import Code, UserError

#: decisions are made on search and certified on held-out; methods may look at calibration
EVALUATION = ("calibration", "search", "held-out")
#: images of the calibration split of a dataset with at least CALIBRATION_FROM images; a smaller
#: dataset gives a fifth of its images
CALIBRATION_IMAGES, CALIBRATION_FROM = 1024, 5000
#: three splits of at least one image
FEWEST_IMAGES = 5


class Source(Protocol):
    """A split's images in their final order. Pickles small: decoding processes load the images."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [M]."""

    def name(self, index: int) -> str:
        """The image's name in messages."""

    def load(self, index: int) -> Image.Image:
        """The RGB image. Raises what the image library raises on a corrupt one."""


class ListedSplit(Source, Protocol):
    """A split before it is decoded."""

    def stamp(self) -> str:
        """A hash of the images, their labels and their order; not of where they are stored."""

    def first(self, images: int) -> ListedSplit:
        """The split's first images."""

    def __len__(self) -> int: ...


def stratified_order(keys: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """A shuffled order in which every prefix is nearly balanced by class: positions, int64 [M].

    Within a class the keys are shuffled; the image of rank r among the n of its class gets the
    position (r + u) / n, u uniform in [0, 1). In any prefix of length t * M, each class has t * n
    images to within one. Shuffling is by hash, not by a generator: it does not depend on the
    version of any library, and adding an image does not change the order of the others.
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
    position = (rank + draws[:, 1] / 2.0**64) / counts[labels]
    return np.lexsort((draws[:, 0], position))


def divide(keys: Sequence[str], labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Calibration, search and held-out of one set: disjoint positions, each in its order.

    Raises UserError if there are fewer than 5 images.
    """
    total = len(keys)
    if total < FEWEST_IMAGES:
        raise UserError(
            f"a dataset must have at least {FEWEST_IMAGES} images for its three splits (got "
            f"{total})",
            Code.OUT_OF_RANGE,
            name="images",
            got=total,
        )
    calibration = CALIBRATION_IMAGES if total >= CALIBRATION_FROM else total // 5
    order = stratified_order(keys, labels, seed)
    ends = (calibration, calibration + total // 5)
    splits = {}
    for name, members in zip(EVALUATION, np.split(order, ends), strict=True):
        within = stratified_order([f"{name}/{keys[i]}" for i in members], labels[members], seed)
        splits[name] = members[within]
    return splits
