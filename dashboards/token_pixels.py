"""A followed image as pixels and lines: dropped patches pale, groups filled with their mean and
outlined, fused ones tinted. Arrays in, arrays out: `dashboards.token_picture` puts them on a page.
"""

from __future__ import annotations

import colorsys
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from vitpareto.search.compare.token_trace import ImageTrace, MergeKind, TokenTrace

PAPER = np.array([0.96, 0.96, 0.96])
_LEFT = 0.1  # what is left of the picture where a patch is dropped
FUSED = np.array([0.95, 0.50, 0.10])
_FUSED_SHARE = 0.7

#: Outline colours, in the order in which they are given out. By the golden ratio each is far from
#: the few before it on the circle of hues; those 8 and 13 apart have hues alike and other tones.
#: No more: 21 apart, both would be.
_TONES = ((0.85, 0.95), (0.45, 1.0), (1.0, 0.62))  # saturation, value
OUTLINES = np.array(
    [colorsys.hsv_to_rgb(k * 0.6180339887498949 % 1.0, *_TONES[k % 3]) for k in range(21)]
)


def owners_of(image: ImageTrace, followed: TokenTrace) -> NDArray[np.int64]:
    """The patch that each pixel is cut into, [h, w]; pixels beyond the last whole patch are in
    none and left out.
    """
    (rows, columns), (ph, pw) = followed.grid, followed.patch
    height, width = image.pixels.shape[:2]
    y, x = np.arange(min(height, rows * ph)) // ph, np.arange(min(width, columns * pw)) // pw
    return y[:, None] * columns + x[None, :]


def painted(image: ImageTrace, block: int, followed: TokenTrace) -> NDArray[np.float64]:
    """The image after a block, [h, w, 3] in 0..1, without outlines."""
    owners = owners_of(image, followed)
    out = image.pixels[: owners.shape[0], : owners.shape[1]] / 255
    group = image.group[block]
    gone, several = (group < 0)[owners], image.joined(followed.together)[block][owners]
    if several.any():
        of = group[owners][several]
        if followed.together == "fused":
            out[several] = tinted(out[several])
        else:
            area = np.bincount(of)
            sums = [np.bincount(of, weights=out[several][:, c]) for c in range(3)]
            out[several] = (np.stack(sums, axis=1) / np.maximum(area, 1)[:, None])[of]
    out[gone] = PAPER + _LEFT * (out[gone] - PAPER)
    return out


def tinted(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours [..., 3] of fused patches, still to be told apart."""
    return colours + _FUSED_SHARE * (FUSED - colours)


def group_colours(image: ImageTrace, together: MergeKind) -> list[NDArray[np.float64]]:
    """For each block the outline colours of the patches' groups, [n0, 3]; 0 where there is none.

    A group keeps its colour while its first patch stays the first. Groups of one block have
    different colours as far as these go, then each is had by as few as can be.
    """
    out, held = [], dict[int, int]()  # first patch -> which colour
    for group, several in zip(image.group, image.joined(together), strict=True):
        colours = np.zeros((len(group), 3))
        members = [np.flatnonzero(several & (group == g)) for g in np.unique(group[several])]
        held = {int(m[0]): held[int(m[0])] for m in members if int(m[0]) in held}
        for m in sorted(members, key=lambda m: int(m[0])):
            taken = Counter(held.values())
            free = min(range(len(OUTLINES)), key=lambda k: (taken[k], k))
            colours[m] = OUTLINES[held.setdefault(int(m[0]), free)]
        out.append(np.where(several[:, None], FUSED, 0.0) if together == "fused" else colours)
    return out


def outlines(
    image: ImageTrace,
    block: int,
    colours: NDArray[np.float64],
    followed: TokenTrace,
    inset: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(segments [k, 2, 2] in pixels (x, y), colours [k, 3]) around the groups of joined patches
    after a block, `inset` pixels inside, so that groups side by side both show theirs.
    colours [n0, 3]: each patch's group's.
    """
    group, several = image.group[block], image.joined(followed.together)[block]
    rows, columns = followed.grid
    ph, pw = followed.patch
    label = np.full((rows + 2, columns + 2), -2)
    label[1:-1, 1:-1] = group.reshape(rows, columns)
    centre = label[1:-1, 1:-1]
    y, x = np.divmod(np.arange(len(group)), columns)
    left, right, top, bottom = x * pw, (x + 1) * pw, y * ph, (y + 1) * ph
    sides = (
        (label[:-2, 1:-1], left, right, top + inset, top + inset),
        (label[2:, 1:-1], left, right, bottom - inset, bottom - inset),
        (label[1:-1, :-2], left + inset, left + inset, top, bottom),
        (label[1:-1, 2:], right - inset, right - inset, top, bottom),
    )
    segments, tints = [], []
    for neighbour, x0, x1, y0, y1 in sides:
        on = several & (neighbour != centre).ravel()
        segments.append(np.stack([x0, y0, x1, y1], axis=1)[on].reshape(-1, 2, 2))
        tints.append(colours[on])
    return np.concatenate(segments), np.concatenate(tints)
