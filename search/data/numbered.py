"""Datasets whose images are numbered: a training part, and a test part that is divided in three."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from PIL import Image

from vitpareto.search.data.splits import ListedSplit, divide, stratified_order


@dataclass(frozen=True)
class NumberedImages:
    """Images of a dataset's training or test part, by number (`splits.ListedSplit`).

    Subclasses read the dataset's files.

    Attributes:
        spec: the dataset's name.
        root: the folder of its files.
        train: the training part, otherwise the test part.
        order: int64 [M], the numbers of the images in the split's order.
    """

    spec: ClassVar[str]
    root: Path
    train: bool
    order: np.ndarray

    @property
    def part(self) -> str:
        """The name of the part, for messages and the stamp."""
        return "train" if self.train else "test"

    def __len__(self) -> int:
        return len(self.order)

    @property
    def labels(self) -> np.ndarray:
        return self.all_labels()[self.order]

    def name(self, index: int) -> str:
        return f"{self.spec} {self.part} image {self.order[index]}"

    def load(self, index: int) -> Image.Image:
        return self.image(int(self.order[index]))

    def first(self, images: int) -> Self:
        return replace(self, order=self.order[:images])

    def stamp(self) -> str:
        order = hashlib.sha256(np.asarray(self.order, dtype="<i8").tobytes()).hexdigest()
        return f"{self.version()} {order}"

    def all_labels(self) -> np.ndarray:
        """Labels of the whole part, int64."""
        raise NotImplementedError

    def image(self, number: int) -> Image.Image:
        """One RGB image of the part."""
        raise NotImplementedError

    def version(self) -> str:
        """Identifies the part's content."""
        raise NotImplementedError


def train_and_test(
    source: Callable[[bool, np.ndarray], ListedSplit],
    train: np.ndarray,
    test: np.ndarray,
    seed: int,
) -> dict[str, ListedSplit]:
    """The splits: the training images in their order, and the test images divided in three.

    Args:
        source: lists images by (training part, numbers).
        train: labels of the training images.
        test: labels of the test images.
        seed: of the order and the division.
    """
    order = stratified_order([f"train/{i}" for i in range(len(train))], train, seed)
    listed = {"train": source(True, order)}
    for name, members in divide([f"test/{i}" for i in range(len(test))], test, seed).items():
        listed[name] = source(False, members)
    return listed
