"""Fashion-MNIST: four IDX files (http://yann.lecun.com/exdb/mnist describes the format)."""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from vitpareto.search.data.numbered import NumberedImages, train_and_test
from vitpareto.search.data.splits import ListedSplit
from vitpareto.search.errors import Code, UserError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
#: images and labels, of the training part and of the test part
FILES = {
    True: ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    False: ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


@dataclass(frozen=True)
class Part:
    """The training or test part: images uint8 [M, H, W], labels int64 [M], sha256 of both."""

    images: np.ndarray
    labels: np.ndarray
    digest: str


@dataclass(frozen=True)
class FashionImages(NumberedImages):
    """Grey images of 28 x 28 pixels, as three equal channels."""

    spec = "fashionmnist"

    def all_labels(self) -> np.ndarray:
        return _part(self.root, self.train).labels

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(_part(self.root, self.train).images[number]).convert("RGB")

    def version(self) -> str:
        return _part(self.root, self.train).digest


def list_fashionmnist(
    root: Path | None, cache: Path, seed: int
) -> tuple[tuple[str, ...], dict[str, ListedSplit]]:
    """Classes and splits of the four files in `root`, or in FashionMNIST/raw below it, where
    torchvision stores them. Without `root` they are looked for in the cache.

    Raises UserError if a file is missing or damaged.
    """
    given = cache / "datasets" if root is None else root
    below = Path("FashionMNIST", "raw")
    files = [name for pair in FILES.values() for name in pair]
    missing = {
        folder: tuple(f"{name}.gz" for name in files if not _path(folder, name).is_file())
        for folder in (given, given / below)
    }
    folder = min(missing, key=lambda each: len(missing[each]))
    if missing[folder]:
        target = given / below if root is None else folder
        raise UserError(
            f"Fashion-MNIST is not in {given}: {', '.join(missing[folder])} missing. Download "
            f"them from {URL}/ into {target}, or give fashionmnist:DIR, the folder that has them",
            Code.NOT_FOUND,
            path=str(given),
            missing=missing[folder],
            target=str(target),
            url=URL,
        )
    train, test = (_part(folder, train).labels for train in (True, False))
    return CLASSES, train_and_test(partial(FashionImages, folder), train, test, seed)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The content of an IDX file of bytes: uint8 with the given number of dimensions. The file is
    gzipped if its name ends in .gz.

    Raises UserError if the file cannot be read, is of another kind or is truncated.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:  # a BadGzipFile is an OSError
        raise UserError(
            f"{path} cannot be read ({error}): download it again", Code.UNREADABLE, path=str(path)
        ) from error
    magic, start = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if raw[:4] != magic or len(raw) < start:
        raise UserError(
            f"{path} must be an IDX file of bytes with {dimensions} dimensions, which begins with "
            f"{magic.hex()} (got {raw[:4].hex() or 'an empty file'})",
            Code.WRONG_TYPE,
            path=str(path),
            got=raw[:4].hex(),
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if math.prod(shape) != len(raw) - start:
        raise UserError(
            f"{path} must have {' x '.join(map(str, shape))} bytes according to its header (got "
            f"{len(raw) - start}): it is damaged, download it again",
            Code.MISMATCH,
            path=str(path),
            got=len(raw) - start,
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


@lru_cache(maxsize=2)  # the training images are 47 MB
def _part(folder: Path, train: bool) -> Part:
    paths = [_path(folder, name) for name in FILES[train]]
    images, labels = (read_idx(p, d) for p, d in zip(paths, (3, 1), strict=True))
    if len(images) != len(labels):
        raise UserError(
            f"{paths[0]} and {paths[1]} must have the same number of items (got {len(images)} "
            f"images and {len(labels)} labels)",
            Code.MISMATCH,
            path=str(paths[1]),
            images=len(images),
            labels=len(labels),
        )
    if labels.max(initial=0) >= len(CLASSES):
        raise UserError(
            f"labels in {paths[1]} must be 0 to {len(CLASSES) - 1} (got {labels.max()})",
            Code.OUT_OF_RANGE,
            path=str(paths[1]),
            got=int(labels.max()),
        )
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(images.tobytes() + labels.tobytes())
    return Part(images, labels.astype(np.int64), digest.hexdigest())


def _path(folder: Path, name: str) -> Path:
    """The file as it is downloaded, or unpacked."""
    packed = folder / f"{name}.gz"
    return packed if packed.is_file() else folder / name
