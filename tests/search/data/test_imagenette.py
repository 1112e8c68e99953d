"""Imagenette: its ten classes are logits of an ImageNet-1k head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm.data
from PIL import Image

from tests.refusals import refused
from vitpareto.methods import Code
from vitpareto.search.data.datasets import check_head, open_data
from vitpareto.search.data.imagenette import CLASSES, URL
from vitpareto.search.data.named import NAMES
from vitpareto.search.data.preprocess import Preprocess

EXACT = Preprocess((3, 28, 28), (0.5,) * 3, (0.25,) * 3, "bicubic", 1.0, "center")


def write_imagenette(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
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
    assert data.classes == CLASSES
    assert data.head_indices == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    info = timm.data.ImageNetInfo("imagenet-1k")
    assert [info.index_to_label_name(i) for i in data.head_indices] == list(CLASSES)
    described = " ".join(info.index_to_description(i) for i in data.head_indices)
    for word in ("tench", "English springer", "cassette player", "chain saw", "church",
                 "French horn", "garbage truck", "gas pump", "golf ball", "parachute"):  # fmt: skip
        assert word in described
    assert check_head(1000, data) == data.head_indices
    assert check_head(10, data) is None, "a head trained on Imagenette itself"
    assert sorted(set(data.split("train").labels)) == list(range(10))


def test_imagenettes_largest_folder_is_used(tmp_path: Path, cache: Path) -> None:
    write_imagenette(cache / "datasets/imagenette2-160")
    small = open_data("imagenette", EXACT, cache=cache)
    full = write_imagenette(cache / "datasets/imagenette2")
    (full / "val" / CLASSES[0] / "one_more.JPEG").write_bytes(
        (full / "val" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG").read_bytes()
    )
    both = open_data("imagenette", EXACT, cache=cache)
    assert sum(both.sizes.values()) == sum(small.sizes.values()) + 1
    assert open_data(f"imagenette:{full}", EXACT, cache=cache).fingerprint == both.fingerprint


def test_missing_or_other_folders_are_refused(tmp_path: Path, cache: Path) -> None:
    with refused(Code.NOT_FOUND, path=str(cache / "datasets"), url=URL):
        open_data("imagenette", EXACT, cache=cache)
    nine = write_imagenette(tmp_path / "nine", CLASSES[:-1])
    with refused(Code.MISMATCH, path=str(nine), missing=CLASSES[-1:], unknown=()):
        open_data(f"imagenette:{nine}", EXACT, cache=cache)
    eleven = write_imagenette(tmp_path / "eleven", (*CLASSES, "n01443537"))
    with refused(Code.MISMATCH, path=str(eleven), missing=(), unknown=("n01443537",)):
        open_data(f"imagenette:{eleven}", EXACT, cache=cache)


def test_the_nearest_name_is_suggested(cache: Path) -> None:
    for name, near in (("imagnette", "imagenette"), ("fashion-mnist", "fashionmnist")):
        with refused(Code.UNKNOWN_NAME, name=name, accepted=NAMES, closest=near):
            open_data(name, EXACT, cache=cache)
