"""The embedded images: disjoint splits, drawings that repeat, and balanced prefixes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.refusals import refused
from vitpareto.methods import Code
from vitpareto.search.data import embedded_images


def test_no_source_digit_is_in_two_splits() -> None:
    digits = {
        split: set(embedded_images.source_digits(split).tolist())
        for split in embedded_images.SPLITS
    }
    assert {split: len(found) for split, found in digits.items()} == embedded_images.SPLITS
    for one, other in itertools.combinations(digits.values(), 2):
        assert not one & other
    assert set().union(*digits.values()) == set(range(1797))


def test_drawings_repeat_and_differ_between_training_epochs() -> None:
    images, labels = embedded_images.draw("calibration")
    again, _ = embedded_images.draw("calibration")
    assert images.shape == (200, 64, 64, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert images.tobytes() == again.tobytes()
    first, same = embedded_images.draw("train", 0)
    second, labels_again = embedded_images.draw("train", 1)
    assert (first != second).any(axis=(1, 2, 3)).all()
    assert (same == labels_again).all()


def test_drawings_are_the_same_in_every_version() -> None:
    # Means, not a hash: the last bit of a sine may differ between processors.
    for split, mean in {"calibration": 26.35172, "held-out": 25.77192}.items():
        assert embedded_images.draw(split)[0].mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("split", embedded_images.SPLITS)
def test_every_prefix_is_nearly_balanced(split: str) -> None:
    labels = embedded_images.draw(split)[1]
    share = np.bincount(labels, minlength=10) / len(labels)
    for n in range(1, len(labels) + 1):
        # A class's members are spread one to an interval, so a prefix is off by less than 2
        # (1 at either end) against the whole 1,797, hence 3 against its own split.
        assert np.abs(np.bincount(labels[:n], minlength=10) - n * share).max() < 3
    assert not (np.diff(labels) >= 0).all()


def test_bad_splits_and_epochs_are_refused() -> None:
    with refused(Code.UNKNOWN_NAME, name="heldout"):
        embedded_images.draw("heldout")
    with refused(Code.OUT_OF_RANGE, got=-1):
        embedded_images.draw("train", -1)
    with refused(Code.OUT_OF_RANGE, got=3, split="search"):
        embedded_images.draw("search", 3)
