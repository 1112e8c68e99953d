"""Data sets that are known by name: what lies where, their classes, and how they are split.

`search.data.datasets.open_data` takes the names. CIFAR-10 is downloaded where it is not there;
Fashion-MNIST and Imagenette are read where their files are.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from vitpareto.search.data.splits import Listed, divide, stratified_order
from vitpareto.search.errors import UserError
from vitpareto.search.files.locks import locked

NAMES = ("digits", "cifar10", "fashionmnist", "imagenette")

logger = logging.getLogger(__name__)


def _train_and_test(
    source: Callable[[bool, np.ndarray], Listed], train: np.ndarray, test: np.ndarray, seed: int
) -> dict[str, Listed]:
    """The test images divided in three, the training images in their order.

    source(train, positions) lists images of one of both; `train` and `test` are their labels.
    """
    order = stratified_order([f"train/{i}" for i in range(len(train))], train, seed)
    listed = {"train": source(True, order)}
    for name, members in divide([f"test/{i}" for i in range(len(test))], test, seed).items():
        listed[name] = source(False, members)
    return listed


@dataclass(frozen=True)
class _Numbered:
    """Images of a data set's training or test part, by their numbers in it; `root` has its files.
    A subclass says what the part holds.
    """

    spec: ClassVar[str]
    root: Path
    train: bool
    order: np.ndarray

    @property
    def part(self) -> str:
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
        """int64, of the whole part."""
        raise NotImplementedError

    def image(self, number: int) -> Image.Image:
        raise NotImplementedError

    def version(self) -> str:
        """What the part's content is known by."""
        raise NotImplementedError


# --- CIFAR-10, through torchvision


@lru_cache(maxsize=1)  # the training images are 150 MB
def _cifar10_images(root: Path, train: bool) -> np.ndarray:
    return _cifar10_read(root, train).data


@lru_cache(maxsize=4)
def _cifar10_labels(root: Path, train: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [M] and the class names; RuntimeError where they are not in `root`."""
    whole = _cifar10_read(root, train)
    return np.asarray(whole.targets, dtype=np.int64), tuple(whole.classes)


def _cifar10_read(root: Path, train: bool) -> CIFAR10:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2.4 on the archive's own old pickles
        return CIFAR10(str(root), train=train, download=False)


@dataclass(frozen=True)
class _Cifar10(_Numbered):
    spec = "cifar10"

    def all_labels(self) -> np.ndarray:
        return _cifar10_labels(self.root, self.train)[0]

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(_cifar10_images(self.root, self.train)[number])

    def version(self) -> str:
        # torchvision refuses files whose MD5 are not the published ones: the archive is its name.
        return f"{CIFAR10.tgz_md5} {self.part}"


def list_cifar10(
    root: Path | None, cache: Path, seed: int
) -> tuple[tuple[str, ...], dict[str, Listed]]:
    place = cache / "datasets" if root is None else root
    if place.name == CIFAR10.base_folder:
        place = place.parent
    try:
        labels, classes = _cifar10_labels(place, False)
    except RuntimeError:
        _download_cifar10(place)
        labels, classes = _cifar10_labels(place, False)
    train, _ = _cifar10_labels(place, True)
    listed = _train_and_test(partial(_Cifar10, place), train, labels, seed)
    return classes, listed


def _download_cifar10(root: Path) -> None:
    logger.info("CIFAR-10 is not in %s: downloading it", root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / "cifar-10.lock"):
            CIFAR10(str(root), train=False, download=True)
    except (OSError, RuntimeError) as error:  # a URLError is an OSError
        raise UserError(
            f"CIFAR-10 is not in {root} and cannot be downloaded there ({error}): give "
            f"cifar10:ROOT, where ROOT/{CIFAR10.base_folder} is the unpacked archive"
        ) from error


# --- Fashion-MNIST: four IDX files, as LeCun's MNIST page describes them

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
FASHION_FILES = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of an IDX file as uint8 with so many dimensions; gzipped where it ends in .gz.

    Raises UserError, naming the file, for one that cannot be read, is of another kind or is cut.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:  # a BadGzipFile is an OSError
        raise UserError(f"{path} cannot be read ({error}): download it again") from error
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if raw[:4] != magic or len(raw) < start:
        raise UserError(
            f"{path} begins with {raw[:4].hex() or 'nothing'}: accepted is an IDX file of bytes "
            f"with {dimensions} dimensions, which begins with {magic.hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if math.prod(shape) != len(raw) - start:
        raise UserError(
            f"{path} holds {len(raw) - start} bytes, and says {' x '.join(map(str, shape))}: it is "
            "damaged, download it again"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=2)  # the training images are 47 MB
def _fashion(folder: Path, train: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 [M, H, W], labels int64 [M] and the sha256 of both."""
    places = [_fashion_file(folder, name) for name in FASHION_FILES[train]]
    images, labels = (read_idx(p, d) for p, d in zip(places, (3, 1), strict=True))
    if len(images) != len(labels):
        raise UserError(
            f"{places[0]} holds {len(images)} images, {places[1]} {len(labels)} labels: they do "
            "not belong together"
        )
    if labels.max(initial=0) >= len(FASHION_CLASSES):
        raise UserError(f"{places[1]} holds the label {labels.max()}: accepted are 0 to 9")
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(images.tobytes() + labels.tobytes())
    return images, labels.astype(np.int64), digest.hexdigest()


def _fashion_file(folder: Path, name: str) -> Path:
    """The file as it is downloaded, or unpacked."""
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name


@dataclass(frozen=True)
class _Fashion(_Numbered):
    """Grey images of 28 x 28 pixels, shown to the model in three equal channels."""

    spec = "fashionmnist"

    def all_labels(self) -> np.ndarray:
        return _fashion(self.root, self.train)[1]

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(_fashion(self.root, self.train)[0][number]).convert("RGB")

    def version(self) -> str:
        return _fashion(self.root, self.train)[2]


def list_fashionmnist(
    root: Path | None, cache: Path, seed: int
) -> tuple[tuple[str, ...], dict[str, Listed]]:
    """Classes and splits of the four files in `root`, or where torchvision puts them below it.

    Raises UserError where one is missing, naming it, where it comes from and where it belongs.
    """
    place = cache / "datasets" if root is None else root
    below = Path("FashionMNIST", "raw")
    files = [name for pair in FASHION_FILES.values() for name in pair]
    missing = {
        folder: [f"{name}.gz" for name in files if not _fashion_file(folder, name).is_file()]
        for folder in (place, place / below)
    }
    folder = min(missing, key=lambda each: len(missing[each]))
    if missing[folder]:
        wanted = place / below if root is None else folder
        raise UserError(
            f"Fashion-MNIST is not in {place}: {', '.join(missing[folder])} missing. Download "
            f"them from {FASHION_URL}/ into {wanted}, or give fashionmnist:DIR, the folder where "
            "they are"
        )
    train, test = (_fashion(folder, part)[1] for part in (True, False))
    return FASHION_CLASSES, _train_and_test(partial(_Fashion, folder), train, test, seed)


# --- Imagenette: image folders

IMAGENETTE_CLASSES = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042",
    "n03425413", "n03445777", "n03888257",
)  # fmt: skip
#: as its archives unpack, in full size, 320 px and 160 px on the shorter side
IMAGENETTE_FOLDERS = ("imagenette2", "imagenette2-320", "imagenette2-160")
IMAGENETTE_URL = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"


def imagenette_folder(root: Path | None, cache: Path) -> Path:
    """The folder with Imagenette's train/ and val/: `root`, or the largest of its archives there.

    Its ten classes are ImageNet-1k's (indices 0, 217, 482, 491, 497, 566, 569, 571, 574, 701), so
    that a head of 1,000 is read at those ten. Both of its parts hold images of ImageNet-1k's
    training set: a model trained there has seen some of them.

    Raises UserError where it is not there.
    """
    place = cache / "datasets" if root is None else root
    for folder in (place, *(place / name for name in IMAGENETTE_FOLDERS)):
        if (folder / "val").is_dir():
            break
    else:
        raise UserError(
            f"Imagenette is not in {place}: no val/ there, nor in {', '.join(IMAGENETTE_FOLDERS)} "
            f"below it. Download {IMAGENETTE_URL} and unpack it in {place}, or give "
            "imagenette:DIR, the folder with its train/ and val/"
        )
    return folder


def check_imagenette(folder: Path, classes: tuple[str, ...]) -> None:
    """UserError, naming one that is missing or too many, unless the classes are Imagenette's."""
    wrong = sorted(set(classes) ^ set(IMAGENETTE_CLASSES))
    if wrong:
        what = "is not one of" if wrong[0] in classes else "is missing of"
        raise UserError(
            f"{folder} is not Imagenette: {wrong[0]} {what} its ten class folders, "
            f"{', '.join(IMAGENETTE_CLASSES)}"
        )


# --- the embedded digits


@lru_cache(maxsize=4)
def _drawn(split: str) -> tuple[np.ndarray, np.ndarray]:
    # not above: it imports scikit-learn, which only digits need
    from vitpareto.search.data import embedded_images

    images, labels = embedded_images.draw(split)
    return np.asarray(images), np.asarray(labels, dtype=np.int64)


@dataclass(frozen=True)
class _Digits:
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

    def first(self, images: int) -> _Digits:
        return _Digits(self.split, images)

    def stamp(self) -> str:
        drawn = _drawn(self.split)[0][: self.images].tobytes()
        return hashlib.sha256(drawn + self.labels.tobytes()).hexdigest()


def list_digits() -> tuple[tuple[str, ...], dict[str, Listed]]:
    from vitpareto.search.data import embedded_images

    listed: dict[str, Listed] = {s: _Digits(s, n) for s, n in embedded_images.SPLITS.items()}
    return tuple(embedded_images.CLASSES), listed
