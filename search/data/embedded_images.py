"""The embedded images: handwritten digits for the demo, the tests and a first look, offline.

The digits are scikit-learn's (8x8 pixels; UCI "Optical Recognition of Handwritten Digits"). Each is
drawn once on a larger canvas with fragments of other *training* digits as clutter. A digit covers
about 4 of the 64 patches, so accuracy depends on which patches a method keeps. The digits are split
before anything is drawn: no source digit is in two splits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpareto.search.errors import Code, UserError

CLASSES = tuple("0123456789")
#: source digits per split, in the order in which they are dealt
SPLITS = {"train": 797, "calibration": 200, "search": 400, "held-out": 400}
#: side of the canvas and of a patch, in pixels
SIZE, PATCH = 64, 8
#: per channel, on the 0-1 scale
MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)

_SEED = 2024
_FRAGMENTS = 6
#: side in pixels of the square that a stamp may touch: a whole digit, and a 4x4 fragment of one
_DIGIT_WINDOW, _FRAGMENT_WINDOW = 22, 14

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Glyphs:
    """scikit-learn's digits: `images` float32 [1797, 8, 8] in 0..1, `labels` int64 [1797], and the
    indices that each split draws, in its order.
    """

    images: Floats
    labels: NDArray[np.int64]
    splits: dict[str, NDArray[np.int64]]


@functools.cache
def glyphs() -> Glyphs:
    """The source digits and their splits.

    Every class is spread evenly, in random order, over one sequence that is cut into the splits:
    each split, and each prefix of a split, is stratified.
    """
    from sklearn.datasets import load_digits  # slow to import, and only drawing needs it

    data = load_digits()
    labels = data.target.astype(np.int64)
    rng = np.random.default_rng(_SEED)
    position = np.empty(len(labels))
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random(len(members))) / len(members)
    parts = np.split(np.argsort(position), np.cumsum(list(SPLITS.values()))[:-1])
    images = (data.images / 16).astype(np.float32)
    return Glyphs(images, labels, dict(zip(SPLITS, parts, strict=True)))


def source_digits(split: str) -> NDArray[np.int64]:
    """Which of scikit-learn's 1,797 digits a split draws, in its order: indices [M]."""
    if split not in SPLITS:
        raise UserError.unknown(
            f"unknown split {split!r}",
            split,
            SPLITS,
            name=split,
        )
    return glyphs().splits[split]


def draw(split: str, epoch: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A split's images, uint8 [M, 64, 64, 3], and labels, int64 [M]; the same on every call.

    Images are shuffled and class-stratified: every prefix is nearly balanced. Training digits have
    a new drawing for every `epoch`; the other splits have one drawing, epoch 0.

    Raises UserError for an unknown split, a negative epoch, or an epoch other than 0 outside
    training.
    """
    digits = source_digits(split)
    if epoch < 0:
        raise UserError(f"epoch must be at least 0 (got {epoch})", Code.OUT_OF_RANGE, got=epoch)
    if epoch and split != "train":
        raise UserError(
            f"epoch must be 0 for split {split!r} (got {epoch}): only 'train' has one drawing per "
            "epoch",
            Code.OUT_OF_RANGE,
            got=epoch,
            split=split,
        )
    return paint(split, epoch, 1.0)[0], glyphs().labels[digits]


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Images as `draw` returns them -> the model's input, float32 [M, 3, 64, 64]."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def paint(split: str, epoch: int, difficulty: float) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One drawing [M, 64, 64, 3] of every digit of a split, and each digit's first patch (y, x):
    [2, M]. A digit covers 2x2 patches from there.

    At `difficulty` 1 a digit may be anywhere on the canvas. Below 1 it stays nearer to the middle
    and the clutter is fainter (for the start of training; `draw` always uses 1).
    """
    source = glyphs()
    digits = source.splits[split]
    m = len(digits)
    rng = np.random.default_rng([_SEED, list(SPLITS).index(split), epoch])
    pad = _DIGIT_WINDOW
    canvas = np.zeros((m, SIZE + 2 * pad, SIZE + 2 * pad, 3), dtype=np.float32)
    # a digit is on a block of 2x2 patches, shifted by up to a pixel
    offset = np.round(rng.uniform(-3.5, 3.5, (2, m)) * difficulty)
    corner = 3 + np.clip(offset, -3, 3).astype(np.int64)
    centre = PATCH * (corner + 1) + rng.uniform(-1, 1, (2, m))
    for _ in range(_FRAGMENTS):
        _add_fragments(canvas, rng, source, centre, difficulty)
    # training digits vary more: slant, and stroke width by a power of the ink
    wide, shape = 1, np.ones(1)
    if split == "train":
        wide, shape = 2, rng.uniform(0.6, 1.5, (m, 1, 1))
    scale = rng.uniform(1.75, 2.1, m)
    angle, shear = wide * rng.uniform(-1, 1, (2, m)) * [[0.15], [0.1]]
    ink = _colours(rng, m, 0.75, 1)
    digit = (source.images[digits] ** shape).astype(np.float32)
    _stamp(canvas, digit, centre + pad, _DIGIT_WINDOW, scale, angle, shear, ink)
    base = rng.uniform(0, 0.15, (m, 1, 1, 3)).astype(np.float32)
    image = base + (1 - base) * canvas[:, pad:-pad, pad:-pad]
    image += 0.05 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), corner


def _colours(rng: np.random.Generator, count: int, low: float, high: float) -> NDArray[np.float64]:
    """Random colours [count, 3] of a brightness in low..high."""
    return rng.uniform(low, high, (count, 1)) * rng.uniform(0.6, 1, (count, 3))


def _add_fragments(
    canvas: Floats,
    rng: np.random.Generator,
    source: Glyphs,
    centre: NDArray[np.float64],
    difficulty: float,
) -> None:
    """Draw a 4x4 fragment of a training digit on each canvas, in place, away from `centre`."""
    m = len(canvas)
    fragment = np.zeros((m, 8, 8), dtype=np.float32)
    y, x = rng.integers(0, 5, (2, m, 1)) + np.arange(4)
    origin = rng.choice(source.splits["train"], m)[:, None, None]
    fragment[:, 2:6, 2:6] = source.images[origin, y[:, :, None], x[:, None, :]]
    spot = rng.uniform(0, SIZE, (2, m))
    for _ in range(12):  # a fragment that is still too near after 12 tries stays there
        near = ((spot - centre) ** 2).sum(0) < 15**2
        spot[:, near] = rng.uniform(0, SIZE, (2, int(near.sum())))
    scale, angle = rng.uniform(1.7, 2.1, m), rng.uniform(0, 2 * np.pi, m)
    shear = rng.uniform(-0.2, 0.2, m)
    ink = difficulty * _colours(rng, m, 0.3, 0.65)
    _stamp(canvas, fragment, spot + _DIGIT_WINDOW, _FRAGMENT_WINDOW, scale, angle, shear, ink)


def _stamp(
    canvas: Floats,
    glyphs: Floats,
    centre: NDArray[np.float64],
    window: int,
    scale: NDArray[np.float64],
    angle: NDArray[np.float64],
    shear: NDArray[np.float64],
    colour: NDArray[np.float64],
) -> None:
    """Draw one glyph [8, 8] on each canvas [S, S, 3], in place, where it is brighter.

    `centre` [2, M] in canvas pixels (y, x), `scale` in canvas pixels per source pixel, `angle`
    in radians, `shear` in source columns per row, `colour` [M, 3] in 0..1. Bilinear.
    """
    corner = np.floor(centre).astype(np.int64) - window // 2
    steps = np.arange(window)
    dy, dx = (corner - centre)[..., None] + steps
    cos, sin = ((f(angle) / scale)[:, None, None] for f in (np.cos, np.sin))
    row = (cos * dy[:, :, None] + sin * dx[:, None, :]).astype(np.float32)
    column = (cos * dx[:, None, :] - sin * dy[:, :, None]).astype(np.float32)
    column += shear.astype(np.float32)[:, None, None] * row
    # a black rim of one source pixel: pixels outside the glyph read 0
    row, column = np.clip(row + 4.5, 0, 8.999), np.clip(column + 4.5, 0, 8.999)
    top, left = row.astype(np.int32), column.astype(np.int32)
    row, column = row - top.astype(np.float32), column - left.astype(np.float32)
    flat = np.pad(glyphs, ((0, 0), (1, 1), (1, 1))).reshape(-1)
    at = 100 * np.arange(len(glyphs), dtype=np.int32)[:, None, None] + 10 * top + left
    value = (flat[at] * (1 - row) + flat[at + 10] * row) * (1 - column)
    value += (flat[at + 1] * (1 - row) + flat[at + 11] * row) * column
    y, x = corner[..., None] + steps
    where = np.arange(len(glyphs))[:, None, None], y[:, :, None], x[:, None, :]
    ink = value[..., None] * colour.astype(np.float32)[:, None, None, :]
    canvas[where] = np.maximum(canvas[where], ink)
