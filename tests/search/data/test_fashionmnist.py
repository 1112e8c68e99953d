"""Fashion-MNIST in its own file format, with a few images of noise."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from tests.refusals import refused
from vitpareto.methods import Code
from vitpareto.search.data.datasets import Data, check_head, open_data
from vitpareto.search.data.fashionmnist import CLASSES, URL, read_idx
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.data.splits import EVALUATION

#: no resize and no crop at 28 px: the decoded pixels are the file's
EXACT = Preprocess((3, 28, 28), (0.5,) * 3, (0.25,) * 3, "bicubic", 1.0, "center")
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def idx(array: np.ndarray) -> bytes:
    """The array as an IDX file of bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder: Path, train: int = 20, test: int = 40, packed: bool = True) -> Path:
    """The four files with noise, labels 0 to 9 in turn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [
        array
        for count in (train, test)
        for array in (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            (np.arange(count) % 10).astype(np.uint8),
        )
    ]
    for name, array in zip(FILES, arrays, strict=True):
        if packed:
            (folder / name).write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name.removesuffix(".gz")).write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "unpacked"])
def test_fashionmnist_splits_and_channels(tmp_path: Path, cache: Path, packed: bool) -> None:
    folder = write_fashion(tmp_path / "files", packed=packed)
    data = open_data(f"fashionmnist:{folder}", EXACT, cache=cache)
    assert data.sizes == {"train": 20, "calibration": 8, "search": 8, "held-out": 24}
    assert data.classes == CLASSES and data.classes[9] == "Ankle boot"
    assert data.head_indices is None and check_head(10, data) is None
    suffix = ".gz" if packed else ""
    for names, part in ((FILES[:2], ("train",)), (FILES[2:], EVALUATION)):
        images, labels = (
            read_idx(folder / (name.removesuffix(".gz") + suffix), d)
            for name, d in zip(names, (3, 1), strict=True)
        )
        known = {i.tobytes(): int(label) for i, label in zip(images, labels, strict=True)}
        seen = [
            (image[..., 0].tobytes(), int(label))
            for split in map(data.split, part)
            for image, label in zip(split.images, split.labels, strict=True)
        ]
        assert len(seen) == len(images) and dict(seen) == known
    shown = data.split("search").images
    assert np.array_equal(shown[..., 0], shown[..., 1])
    assert np.array_equal(shown[..., 0], shown[..., 2])


def test_fashionmnist_is_resized_by_timms_transform(tmp_path: Path, cache: Path) -> None:
    """To the model's input, by timm's own evaluation transform."""
    folder = write_fashion(tmp_path / "files")
    preprocess = replace(EXACT, input_size=(3, 64, 48), crop_pct=0.9)
    data = open_data(f"fashionmnist:{folder}", preprocess, cache=cache)
    images, _ = data.split("search").batch(0, 8)
    usual = timm.data.create_transform(**{**preprocess.describe(), "is_training": False})
    raw = open_data(f"fashionmnist:{folder}", EXACT, cache=cache).split("search").images
    for ours, pixels in zip(preprocess.normalise(images), raw, strict=True):
        expected = usual(Image.fromarray(pixels[..., 0]).convert("RGB"))
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=0, atol=1e-6)


def test_fashionmnist_is_found_in_torchvisions_folders(tmp_path: Path, cache: Path) -> None:
    raw = write_fashion(tmp_path / "root/FashionMNIST/raw")
    by_root = open_data(f"fashionmnist:{tmp_path / 'root'}", EXACT, cache=cache)
    in_cache = write_fashion(cache / "datasets/FashionMNIST/raw")
    by_name = open_data("fashionmnist", EXACT, cache=cache)
    assert by_root.fingerprint == by_name.fingerprint, "the place decides nothing"
    assert raw.parent != in_cache.parent


def test_fashionmnists_fingerprint_depends_on_its_content(tmp_path: Path, cache: Path) -> None:
    one = write_fashion(tmp_path / "one")
    other = write_fashion(tmp_path / "other")
    assert fashion(one, cache).fingerprint == fashion(other, cache).fingerprint
    changed = write_fashion(tmp_path / "changed")
    images = read_idx(changed / FILES[2], 3).copy()
    images[7, 3, 4] ^= 1  # one bit of one pixel
    (changed / FILES[2]).write_bytes(gzip.compress(idx(images)))
    assert fashion(changed, cache).fingerprint != fashion(one, cache).fingerprint
    assert fashion(one, cache, seed=1).fingerprint != fashion(one, cache).fingerprint


def fashion(folder: Path, cache: Path, seed: int = 0) -> Data:
    return open_data(f"fashionmnist:{folder}", EXACT, cache=cache, seed=seed)


def test_missing_files_of_fashionmnist_are_listed(tmp_path: Path, cache: Path) -> None:
    target = cache / "datasets/FashionMNIST/raw"
    with refused(Code.NOT_FOUND, missing=FILES, target=str(target), url=URL):
        open_data("fashionmnist", EXACT, cache=cache)
    folder = write_fashion(tmp_path / "files")
    (folder / FILES[3]).unlink()
    with refused(Code.NOT_FOUND, missing=(FILES[3],), target=str(folder)):
        fashion(folder, cache)
    with refused(Code.NOT_FOUND, path=str(tmp_path / "nowhere")):
        fashion(tmp_path / "nowhere", cache)


IMAGES = np.zeros((40, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("name", "content", "code", "details"),
    [
        (FILES[2], gzip.compress(idx(IMAGES))[:-20], Code.UNREADABLE, {}),
        (FILES[2], b"<html>not found</html>", Code.UNREADABLE, {}),
        (FILES[2], gzip.compress(idx(IMAGES[:, 0, 0])), Code.WRONG_TYPE, {"got": "00000801"}),
        (FILES[3], gzip.compress(b""), Code.WRONG_TYPE, {"got": ""}),
        (FILES[2], gzip.compress(idx(IMAGES)[:-5]), Code.MISMATCH, {"got": 31355}),
        (
            FILES[3], gzip.compress(idx(np.zeros(39, np.uint8))),
            Code.MISMATCH, {"images": 40, "labels": 39},
        ),
        (FILES[3], gzip.compress(idx(np.full(40, 10, np.uint8))), Code.OUT_OF_RANGE, {"got": 10}),
    ],
    ids=["truncated", "web page", "labels for images", "empty", "short", "other count", "label"],
)  # fmt: skip
def test_damaged_files_of_fashionmnist_are_refused(
    tmp_path: Path, cache: Path, name: str, content: bytes, code: Code, details: dict[str, object]
) -> None:
    folder = write_fashion(tmp_path / "files")
    (folder / name).write_bytes(content)
    with refused(code, path=str(folder / name), **details) as caught:
        fashion(folder, cache)
    assert "\n" not in str(caught.value)
