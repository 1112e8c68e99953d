"""`open_data`: fingerprints, prefixes, heads and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.refusals import refused
from tests.search.data.image_folders import (
    EVALUATION,
    SMALL,
    members,
)
from vitpareto.methods import Code
from vitpareto.search.data import embedded_images
from vitpareto.search.data.datasets import open_data


def test_splits_are_disjoint_complete_and_stratified(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    assert data.classes == ("ant", "cat", "dog")
    assert data.sizes == {"calibration": 24, "search": 24, "held-out": 72}
    listed = [path for name in EVALUATION for path in members(data, name)]
    assert len(set(listed)) == len(listed) == 120
    for name in EVALUATION:
        counts = np.bincount([data.classes.index(p.split("/")[0]) for p in members(data, name)])
        assert np.abs(counts - data.sizes[name] * np.array([40, 60, 20]) / 120).max() <= 2
    assert not cache.exists(), "nothing is decoded before it is asked for"


def test_splits_depend_on_the_seed_and_not_on_the_path(folder: Path, cache: Path) -> None:
    one = open_data(str(folder), SMALL, cache=cache)
    moved = folder.rename(folder.with_name("moved"))
    again = open_data(str(moved), SMALL, cache=cache)
    other = open_data(str(moved), SMALL, cache=cache, seed=1)
    assert again.fingerprint == one.fingerprint != other.fingerprint
    assert members(again, "search") == members(one, "search")
    assert set(members(other, "search")) != set(members(one, "search"))


def test_images_limits_the_search_split_only(folder: Path, cache: Path) -> None:
    whole = open_data(str(folder), SMALL, cache=cache)
    part = open_data(str(folder), SMALL, cache=cache, images=10)
    assert part.sizes == {**whole.sizes, "search": 10}
    assert members(part, "search") == members(whole, "search")[:10]
    assert part.fingerprint != whole.fingerprint
    np.testing.assert_array_equal(part.split("search").images, whole.split("search").images[:10])


def test_digits_have_fixed_splits(cache: Path) -> None:
    preprocess = replace(
        SMALL, input_size=(3, embedded_images.SIZE, embedded_images.SIZE), crop_pct=1.0
    )
    data = open_data("digits", preprocess, cache=cache, images=30)
    assert data.sizes == {**embedded_images.SPLITS, "search": 30}
    assert data.classes == tuple(map(str, embedded_images.CLASSES))
    for name in ("search", "calibration"):
        images, labels = embedded_images.draw(name)
        split = data.split(name)
        assert len(split) == data.sizes[name]
        np.testing.assert_array_equal(split.images, np.asarray(images)[: len(split)])
        np.testing.assert_array_equal(split.labels, np.asarray(labels)[: len(split)])
    assert open_data("digits", preprocess, cache=cache).fingerprint != data.fingerprint


@pytest.mark.parametrize("images", [0, -3, 25])
def test_images_out_of_range(folder: Path, cache: Path, images: int) -> None:
    with refused(Code.OUT_OF_RANGE, name="images", got=images, most=24):
        open_data(str(folder), SMALL, cache=cache, images=images)


def test_an_unknown_split(folder: Path, cache: Path) -> None:
    data = open_data(str(folder), SMALL, cache=cache)
    with refused(Code.UNKNOWN_NAME, name="held_out", accepted=EVALUATION):
        data.split("held_out")
    with refused(Code.UNKNOWN_NAME, name="train"):
        data.split("train")
    with refused(Code.OUT_OF_RANGE, name="workers", got=-1):
        open_data(str(folder), SMALL, cache=cache, workers=-1)
