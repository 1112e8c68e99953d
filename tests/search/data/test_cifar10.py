"""CIFAR-10 in its archive's format, with 60 images."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from tests.refusals import refused
from tests.search.data.image_folders import (
    EVALUATION,
    SMALL,
)
from vitpareto.methods import Code
from vitpareto.search.data.datasets import check_head, open_data


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "archive"
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> tuple[str, str]:
        (base / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    def images(count: int) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [i % 10 for i in range(count)]}

    names = [f"class {i}" for i in range(10)]
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", images(20))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", images(40))])
    name, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return root


def test_cifar10_test_images_are_divided_and_the_training_images_are_train(
    cifar10: Path, cache: Path
) -> None:
    preprocess = replace(SMALL, input_size=(3, 32, 32), crop_pct=1.0)
    data = open_data(f"cifar10:{cifar10}", preprocess, cache=cache)
    assert data.sizes == {"train": 20, "calibration": 8, "search": 8, "held-out": 24}
    assert data.classes[3] == "class 3"
    assert data.head_indices is None
    assert check_head(10, data) is None
    test = CIFAR10(str(cifar10), train=False)
    known = {image.tobytes(): label for image, label in zip(test.data, test.targets, strict=True)}
    seen = [
        (bytes(image.tobytes()), int(label))
        for name in EVALUATION
        for image, label in zip(data.split(name).images, data.split(name).labels, strict=True)
    ]
    assert dict(seen) == known, "at 32 px and no crop the pixels are the archive's"
    assert len(seen) == 40
    train = {image.tobytes() for image in CIFAR10(str(cifar10), train=True).data}
    assert {image.tobytes() for image in data.split("train").images} == train
    inside = open_data(f"cifar10:{cifar10 / CIFAR10.base_folder}", preprocess, cache=cache)
    assert inside.fingerprint == data.fingerprint


def test_cifar10_that_cannot_be_downloaded_is_unavailable(
    cifar10: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with refused(Code.UNAVAILABLE, path=str(cache / "datasets"), reason="no route to host"):
        open_data("cifar10", SMALL, cache=cache)
