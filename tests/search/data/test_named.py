"""Data sets by name, read from small real files of their formats; what is missing is told."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
from PIL import Image

from vitpareto.search.data.datasets import Data, Preprocess, check_head, open_data
from vitpareto.search.data.named import FASHION_CLASSES, IMAGENETTE_CLASSES, read_idx
from vitpareto.search.errors import UserError

EVALUATION = ("calibration", "search", "held-out")
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


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def refused(spec: str, cache: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_data(spec, EXACT, cache=cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Fashion-MNIST


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "unpacked"])
def test_fashionmnist_divides_the_test_images_and_shows_grey_in_three_channels(
    tmp_path: Path, cache: Path, packed: bool
) -> None:
    folder = write_fashion(tmp_path / "files", packed=packed)
    data = open_data(f"fashionmnist:{folder}", EXACT, cache=cache)
    assert data.sizes == {"train": 20, "calibration": 8, "search": 8, "held-out": 24}
    assert data.classes == FASHION_CLASSES and data.classes[9] == "Ankle boot"
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


def test_fashionmnist_is_resized_as_any_image_is(tmp_path: Path, cache: Path) -> None:
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


def test_fashionmnist_is_looked_for_where_torchvision_puts_it(tmp_path: Path, cache: Path) -> None:
    raw = write_fashion(tmp_path / "root/FashionMNIST/raw")
    by_root = open_data(f"fashionmnist:{tmp_path / 'root'}", EXACT, cache=cache)
    in_cache = write_fashion(cache / "datasets/FashionMNIST/raw")
    by_name = open_data("fashionmnist", EXACT, cache=cache)
    assert by_root.fingerprint == by_name.fingerprint, "the place decides nothing"
    assert raw.parent != in_cache.parent


def test_the_fingerprint_of_fashionmnist_is_its_content(tmp_path: Path, cache: Path) -> None:
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


def test_missing_files_of_fashionmnist_are_named_with_their_source_and_place(
    tmp_path: Path, cache: Path
) -> None:
    said = refused("fashionmnist", cache)
    assert all(name in said for name in FILES)
    assert "Download them from http://fashion-mnist.s3-website" in said
    assert f"into {cache / 'datasets/FashionMNIST/raw'}, or give fashionmnist:DIR" in said
    folder = write_fashion(tmp_path / "files")
    (folder / FILES[3]).unlink()
    said = refused(f"fashionmnist:{folder}", cache)
    assert FILES[3] in said and f"into {folder}," in said
    assert not any(name in said for name in FILES[:3]), "only what is missing"
    assert "missing" in refused(f"fashionmnist:{tmp_path / 'nowhere'}", cache)


def damaged(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_damaged_files_of_fashionmnist_are_named(tmp_path: Path, cache: Path) -> None:
    images = np.zeros((40, 28, 28), np.uint8)
    cases = {
        "cut": (FILES[2], gzip.compress(idx(images))[:-20], "cannot be read"),
        "page": (FILES[2], b"<html>not found</html>", "cannot be read"),
        "kind": (FILES[2], gzip.compress(idx(images[:, 0, 0])), "begins with 00000801: accepted"),
        "empty": (FILES[3], gzip.compress(b""), "begins with nothing: accepted"),
        "short": (FILES[2], gzip.compress(idx(images)[:-5]), "holds 31355 bytes, and says 40 x 28"),
        "other": (FILES[3], gzip.compress(idx(np.zeros(39, np.uint8))), "holds 40 images"),
        "label": (FILES[3], gzip.compress(idx(np.full(40, 10, np.uint8))), "the label 10"),
    }
    for case, (name, content, expected) in cases.items():
        folder = write_fashion(tmp_path / case)
        path = damaged(folder, name, content)
        said = refused(f"fashionmnist:{folder}", cache)
        assert str(path) in said and expected in said, case


# --- Imagenette


def write_imagenette(folder: Path, classes: tuple[str, ...] = IMAGENETTE_CLASSES) -> Path:
    """train/ and val/ with JPEGs: 2 and 3 a class."""
    rng = np.random.default_rng(1)
    for part, each in (("train", 2), ("val", 3)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{name}_{i}.JPEG")
    (folder / "noisy_imagenette.csv").write_text("path,noisy_labels_0\n")
    return folder


def test_imagenettes_classes_are_ten_logits_of_an_imagenet_head(
    tmp_path: Path, cache: Path
) -> None:
    folder = write_imagenette(tmp_path / "imagenette2-160")
    data = open_data(f"imagenette:{folder}", EXACT, cache=cache)
    assert data.sizes == {"train": 20, "calibration": 6, "search": 6, "held-out": 18}
    assert data.classes == IMAGENETTE_CLASSES
    assert data.head_indices == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    info = timm.data.ImageNetInfo("imagenet-1k")
    assert [info.index_to_label_name(i) for i in data.head_indices] == list(IMAGENETTE_CLASSES)
    described = " ".join(info.index_to_description(i) for i in data.head_indices)
    for word in ("tench", "English springer", "cassette player", "chain saw", "church",
                 "French horn", "garbage truck", "gas pump", "golf ball", "parachute"):  # fmt: skip
        assert word in described
    assert check_head(1000, data) == data.head_indices
    assert check_head(10, data) is None, "a head trained on Imagenette itself"
    assert sorted(set(data.split("train").labels)) == list(range(10))


def test_imagenette_is_found_below_a_folder_the_largest_first(tmp_path: Path, cache: Path) -> None:
    write_imagenette(cache / "datasets/imagenette2-160")
    small = open_data("imagenette", EXACT, cache=cache)
    full = write_imagenette(cache / "datasets/imagenette2")
    (full / "val" / IMAGENETTE_CLASSES[0] / "one_more.JPEG").write_bytes(
        (full / "val" / IMAGENETTE_CLASSES[1] / f"{IMAGENETTE_CLASSES[1]}_0.JPEG").read_bytes()
    )
    both = open_data("imagenette", EXACT, cache=cache)
    assert sum(both.sizes.values()) == sum(small.sizes.values()) + 1
    assert open_data(f"imagenette:{full}", EXACT, cache=cache).fingerprint == both.fingerprint


def test_missing_or_other_folders_are_no_imagenette(tmp_path: Path, cache: Path) -> None:
    said = refused("imagenette", cache)
    assert "Download https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz" in said
    assert f"unpack it in {cache / 'datasets'}, or give imagenette:DIR" in said
    nine = write_imagenette(tmp_path / "nine", IMAGENETTE_CLASSES[:-1])
    said = refused(f"imagenette:{nine}", cache)
    assert f"{IMAGENETTE_CLASSES[-1]} is missing of its ten" in said and str(nine) in said
    eleven = write_imagenette(tmp_path / "eleven", (*IMAGENETTE_CLASSES, "n01443537"))
    assert "n01443537 is not one of its ten" in refused(f"imagenette:{eleven}", cache)


def test_the_names_are_offered(cache: Path) -> None:
    assert "did you mean 'imagenette'?" in refused("imagnette", cache)
    assert "did you mean 'fashionmnist'?" in refused("fashion-mnist", cache)
    said = refused("flowers", cache)
    assert "accepted are digits, cifar10, fashionmnist, imagenette" in said
