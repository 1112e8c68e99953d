"""The image after a block as pixels and outlines: dropped patches pale, groups filled with their
mean and outlined, fused ones tinted.

Arrays in, arrays out: `token_picture.py` draws them.
"""

from __future__ import annotations

import colorsys
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from vitpareto.search.compare.token_trace import ImageTrace, MergeKind, TokenTrace

PAPER = np.array([0.96, 0.96, 0.96])
_DROPPED_OPACITY = 0.1  # of the image where a patch is dropped
FUSED = np.array([0.95, 0.50, 0.10])
_FUSED_SHARE = 0.7

#: Outline colours in the order of use. Steps of the golden ratio keep successive hues far apart;
#: colours 8 and 13 apart have similar hues and different tones. 21 apart both would be similar, so
#: there are no more.
_TONES = ((0.85, 0.95), (0.45, 1.0), (1.0, 0.62))  # saturation, value
OUTLINES = np.array(
    [colorsys.hsv_to_rgb(k * 0.6180339887498949 % 1.0, *_TONES[k % 3]) for k in range(21)]
)


def patch_of_pixels(image: ImageTrace, trace: TokenTrace) -> NDArray[np.int64]:
    """The patch that each pixel belongs to, [h, w], without pixels beyond the last whole patch."""
    (rows, columns), (ph, pw) = trace.grid, trace.patch
    height, width = image.pixels.shape[:2]
    y, x = np.arange(min(height, rows * ph)) // ph, np.arange(min(width, columns * pw)) // pw
    return y[:, None] * columns + x[None, :]


def pixels_after(image: ImageTrace, block: int, trace: TokenTrace) -> NDArray[np.float64]:
    """The image after a block, [h, w, 3] in 0..1, without outlines."""
    patches = patch_of_pixels(image, trace)
    out = image.pixels[: patches.shape[0], : patches.shape[1]] / 255
    group = image.group[block]
    dropped, joined = (group < 0)[patches], image.joined(trace.together)[block][patches]
    if joined.any():
        of = group[patches][joined]
        if trace.together == "fused":
            out[joined] = tinted(out[joined])
        else:
            area = np.bincount(of)
            sums = [np.bincount(of, weights=out[joined][:, c]) for c in range(3)]
            out[joined] = (np.stack(sums, axis=1) / np.maximum(area, 1)[:, None])[of]
    out[dropped] = PAPER + _DROPPED_OPACITY * (out[dropped] - PAPER)
    return out


def tinted(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours [..., 3] of fused patches, still distinguishable."""
    return colours + _FUSED_SHARE * (FUSED - colours)


def group_colours(image: ImageTrace, together: MergeKind) -> list[NDArray[np.float64]]:
    """The outline colour of each patch's group per block, [n0, 3]; 0 for patches without a group.

    A group keeps its colour as long as its first patch stays the same. Groups of a block have
    different colours; if there are more groups than colours, colours are shared evenly.
    """
    out, held = [], dict[int, int]()  # index of the colour by first patch
    for group, joined in zip(image.group, image.joined(together), strict=True):
        colours = np.zeros((len(group), 3))
        members = [np.flatnonzero(joined & (group == g)) for g in np.unique(group[joined])]
        held = {int(m[0]): held[int(m[0])] for m in members if int(m[0]) in held}
        for m in sorted(members, key=lambda m: int(m[0])):
            taken = Counter(held.values())
            free = min(range(len(OUTLINES)), key=lambda k: (taken[k], k))
            colours[m] = OUTLINES[held.setdefault(int(m[0]), free)]
        out.append(np.where(joined[:, None], FUSED, 0.0) if together == "fused" else colours)
    return out


def outlines(
    image: ImageTrace,
    block: int,
    colours: NDArray[np.float64],
    trace: TokenTrace,
    inset: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Line segments around the groups of joined patches after a block.

    Args:
        image: the trace of one image.
        block: index of the block.
        colours: outline colour of each patch's group, [n0, 3].
        trace: grid and size of patches.
        inset: distance from the edge in pixels, so that outlines of adjacent groups do not overlap.

    Returns:
        Segments [k, 2, 2] in pixels (x, y), and their colours [k, 3].
    """
    group, joined = image.group[block], image.joined(trace.together)[block]
    rows, columns = trace.grid
    ph, pw = trace.patch
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
        on = joined & (neighbour != centre).ravel()
        segments.append(np.stack([x0, y0, x1, y1], axis=1)[on].reshape(-1, 2, 2))
        tints.append(colours[on])
    return np.concatenate(segments), np.concatenate(tints)
