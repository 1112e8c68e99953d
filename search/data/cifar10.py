"""CIFAR-10, read and downloaded by torchvision."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from vitpareto.search.data.numbered import NumberedImages, train_and_test
from vitpareto.search.data.splits import ListedSplit
from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.locks import locked

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)  # the training images are 150 MB
def _images(root: Path, train: bool) -> np.ndarray:
    return _read(root, train).data


@lru_cache(maxsize=4)
def _labels(root: Path, train: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [M] and the class names. Raises RuntimeError if `root` does not have them."""
    dataset = _read(root, train)
    return np.asarray(dataset.targets, dtype=np.int64), tuple(dataset.classes)


def _read(root: Path, train: bool) -> CIFAR10:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2.4 warns about the archive's old pickles
        return CIFAR10(str(root), train=train, download=False)


@dataclass(frozen=True)
class Cifar10Images(NumberedImages):
    """Colour images of 32 x 32 pixels."""

    spec = "cifar10"

    def all_labels(self) -> np.ndarray:
        return _labels(self.root, self.train)[0]

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(_images(self.root, self.train)[number])

    def version(self) -> str:
        # torchvision refuses files whose MD5 is not the published one: the archive's is enough
        return f"{CIFAR10.tgz_md5} {self.part}"


def list_cifar10(
    root: Path | None, cache: Path, seed: int
) -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
    """Classes and splits of the archive in `root`, downloaded if it is missing.

    Raises UserError if it cannot be downloaded.
    """
    folder = cache / "datasets" if root is None else root
    if folder.name == CIFAR10.base_folder:
        folder = folder.parent
    try:
        labels, classes = _labels(folder, False)
    except RuntimeError:
        _download(folder)
        labels, classes = _labels(folder, False)
    source = partial(Cifar10Images, folder)
    return classes, train_and_test(source, _labels(folder, True)[0], labels, seed)


def _download(root: Path) -> None:
    logger.info("downloading CIFAR-10 to %s", root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / "cifar-10.lock", waiting="waiting for another download of CIFAR-10"):
            CIFAR10(str(root), train=False, download=True)
    except (OSError, RuntimeError) as error:  # a URLError is an OSError
        raise UserError(
            f"CIFAR-10 is not in {root} and cannot be downloaded ({error}): give cifar10:ROOT, "
            f"where ROOT/{CIFAR10.base_folder} is the unpacked archive",
            Code.UNAVAILABLE,
            path=str(root),
            reason=str(error),
        ) from error
