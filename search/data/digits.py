"""The embedded images as a dataset, `digits`: listed with its fixed splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from vitpareto.search.data import embedded_images
from vitpareto.search.data.splits import ListedSplit


@lru_cache(maxsize=4)
def _drawn(split: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = embedded_images.draw(split)
    return np.asarray(images), np.asarray(labels, dtype=np.int64)


@dataclass(frozen=True)
class DigitImages:
    """The first images of a split (`splits.ListedSplit`)."""

    split: str
    images: int

    def __len__(self) -> int:
        return self.images

    @property
    def labels(self) -> np.ndarray:
        return _drawn(self.split)[1][: self.images]

    def name(self, index: int) -> str:
        return f"digits {self.split} image {index}"

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(_drawn(self.split)[0][index])

    def first(self, images: int) -> DigitImages:
        return DigitImages(self.split, images)

    def stamp(self) -> str:
        drawn = _drawn(self.split)[0][: self.images].tobytes()
        return hashlib.sha256(drawn + self.labels.tobytes()).hexdigest()


def list_digits() -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
    """Classes and splits of the embedded images."""
    listed: dict[str, ListedSplit] = {
        split: DigitImages(split, images) for split, images in embedded_images.SPLITS.items()
    }
    return embedded_images.CLASSES, listed
