"""Image folders: layouts, classes and bad folders."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
from PIL import Image

from tests.logs import logged
from tests.refusals import refused
from tests.search.data.image_folders import (
    EVALUATION,
    SMALL,
    decoded_folders,
    make_folder,
    members,
)
from vitpareto.methods import Code
from vitpareto.search.data.datasets import check_head, open_data
from vitpareto.search.data.folders import EXTENSIONS
from vitpareto.search.data.named import NAMES
from vitpareto.search.errors import UserError


def test_val_is_divided_and_train_beside_it_is_listed(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "set/val", {"a": 6, "b": 6})
    make_folder(tmp_path / "set/train", {"a": 3, "b": 4, "c": 1})
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.sizes == {"train": 8, "calibration": 2, "search": 2, "held-out": 8}
    assert data.classes == ("a", "b", "c"), "a head trained on train/ has a logit for c"
    assert open_data(str(tmp_path / "set/val"), SMALL, cache=cache) == replace(
        data, spec=str(tmp_path / "set/val")
    )
    data.split("calibration")
    assert len(decoded_folders(cache)) == 1, "train is not decoded unless asked for"
    assert sorted(data.split("train").labels) == [0, 0, 0, 1, 1, 1, 1, 2]


def test_val_is_preferred_to_test_and_test_is_used_without_it(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "set/test", {"a": 5, "b": 5})
    make_folder(tmp_path / "set/train", {"a": 1, "b": 1})
    assert sum(open_data(str(tmp_path / "set"), SMALL, cache=cache).sizes.values()) == 12
    make_folder(tmp_path / "set/validation", {"a": 15, "b": 15})
    assert sum(open_data(str(tmp_path / "set"), SMALL, cache=cache).sizes.values()) == 32
    make_folder(tmp_path / "set/val", {"a": 25, "b": 25})
    assert sum(open_data(str(tmp_path / "set"), SMALL, cache=cache).sizes.values()) == 52


def test_named_split_folders_are_used_as_they_are(tmp_path: Path, cache: Path) -> None:
    for i, name in enumerate(("calibration", "search", "held-out", "train")):
        make_folder(tmp_path / "set" / name, {"a": 2 + i, "b": 3}, seed=i)
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.sizes == {"train": 8, "calibration": 5, "search": 6, "held-out": 7}
    split = data.split("search")
    for pixels, label, path in zip(
        split.images, split.labels, members(data, "search"), strict=True
    ):
        with Image.open(tmp_path / "set/search" / path) as image:
            expected = SMALL.transform()(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels, expected)
        assert data.classes[label] == path.split("/")[0]


def test_extensions_nesting_and_hidden_files(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "a" / "x", {"deep": 4}, suffix=".JPEG")
    make_folder(tmp_path / "a", {"y": 4}, suffix=".Webp")
    (tmp_path / "a/x/._000.jpg").write_bytes(b"resource fork")
    (tmp_path / "a/x/notes.txt").write_text("not an image")
    (tmp_path / "a/.cache").mkdir()
    data = open_data(str(tmp_path / "a"), SMALL, cache=cache)
    assert data.classes == ("x", "y")
    assert sum(data.sizes.values()) == 8
    assert {p for s in EVALUATION for p in members(data, s)} >= {"x/deep/000.JPEG", "y/000.Webp"}


def test_wordnet_folders_restrict_the_labels(tmp_path: Path, cache: Path) -> None:
    known = timm.data.ImageNetInfo("imagenet-1k").label_names()
    wanted = [known[i] for i in (980, 3, 217)]
    make_folder(tmp_path / "val", dict.fromkeys(wanted, 4))
    make_folder(tmp_path / "train", dict.fromkeys([*wanted, known[5]], 2))
    data = open_data(str(tmp_path), SMALL, cache=cache)
    assert data.head_indices == (3, 217, 980)
    assert data.classes == tuple(sorted(wanted))
    assert data.sizes["train"] == 6, "train images of other classes have no label here"
    assert check_head(1000, data) == (3, 217, 980)
    assert check_head(3, data) is None, "a head fine-tuned on just these classes"
    with refused(Code.MISMATCH, got=21843, accepted=(3, 1000)):
        check_head(21843, data)


def test_one_class_outside_imagenet_needs_a_head_of_the_datas_classes(
    tmp_path: Path, cache: Path
) -> None:
    make_folder(tmp_path / "set", {"n01440764": 4, "n99999999": 4})
    data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.head_indices is None
    with refused(Code.MISMATCH, got=1000, accepted=(2,)):
        check_head(1000, data)


def test_numbered_classes_warn_about_timms_order(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path / "set", {"1": 3, "2": 3, "10": 3})
    with caplog.at_level(logging.WARNING):
        data = open_data(str(tmp_path / "set"), SMALL, cache=cache)
    assert data.classes == ("1", "10", "2")
    (warning,) = logged(caplog, "folders")
    assert warning.args == (tmp_path / "set", "1, 10, 2", "1, 2, 10"), "as read, and as timm reads"


def test_bad_folders_are_refused(tmp_path: Path, cache: Path) -> None:
    def refuse(spec: Path | str, code: Code, **details: Any) -> None:
        with refused(code, UserError, **details):
            open_data(str(spec), SMALL, cache=cache)

    refuse(tmp_path / "nowhere", Code.NOT_FOUND, path=str(tmp_path / "nowhere"))
    for name in ("cifra10", "digit", "flowers"):
        refuse(name, Code.UNKNOWN_NAME, name=name, accepted=NAMES)
    refuse("cifra10", Code.UNKNOWN_NAME, closest="cifar10")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", Code.EMPTY, path=str(tmp_path / "empty"))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/1.png")
    refuse(tmp_path / "flat", Code.WRONG_TYPE, path=str(tmp_path / "flat"))
    refuse(tmp_path / "flat/1.png", Code.WRONG_TYPE, path=str(tmp_path / "flat/1.png"))
    hollow = tmp_path / "hollow"
    (hollow / "a").mkdir(parents=True)
    refuse(hollow, Code.EMPTY, path=str(hollow), accepted=tuple(sorted(EXTENSIONS)))
    make_folder(hollow, {"b": 5})
    refuse(hollow, Code.EMPTY, path=str(hollow), name="a")
    make_folder(tmp_path / "single", {"only": 9})
    refuse(tmp_path / "single", Code.OUT_OF_RANGE, name="classes", got=1)
    make_folder(tmp_path / "tiny", {"a": 2, "b": 2})
    refuse(tmp_path / "tiny", Code.OUT_OF_RANGE, name="images", got=4)
    make_folder(tmp_path / "half/search", {"a": 2, "b": 2})
    refuse(tmp_path / "half", Code.MISSING, missing=("calibration/", "held-out/"))
    make_folder(tmp_path / "learn/train", {"a": 5, "b": 5})
    refuse(tmp_path / "learn", Code.MISSING, missing=("val/",))


def test_split_folders_must_be_different_folders(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "set/search", {"a": 5, "b": 5})
    make_folder(tmp_path / "set/calibration", {"a": 5, "b": 5})
    (tmp_path / "set/held-out").symlink_to(tmp_path / "set/search")
    with refused(Code.DUPLICATE, path=str(tmp_path / "set")):
        open_data(str(tmp_path / "set"), SMALL, cache=cache)


def test_an_unreadable_folder(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def denied(path: Any) -> Any:  # chmod does not stop root, who runs the tests in containers
        if Path(path).name == "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    with refused(Code.UNREADABLE, path=str(folder / "cat")):
        open_data(str(folder), SMALL, cache=cache)
