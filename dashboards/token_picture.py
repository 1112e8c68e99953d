"""Which patches a recipe keeps, merges or drops, as one PNG in the style of the papers' figures.

Draws a token trace; runs, chooses and changes nothing. Uses no global state of matplotlib (no
pyplot), so that it can run in a worker or in a thread of a server.
"""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from vitpareto.dashboards.token_pixels import (
    FUSED,
    OUTLINES,
    PAPER,
    group_colours,
    outlines,
    patch_of_pixels,
    pixels_after,
    tinted,
)
from vitpareto.dashboards.token_rows import summary
from vitpareto.search.compare.token_trace import ImageTrace, TokenTrace
from vitpareto.search.errors import Code, UserError

#: largest number of stages that are drawn; of more, evenly spaced ones with the first and the last
COLUMNS = 8
#: lengths in inches, sizes of text in points
_CELL, _GAP, _MARGIN = 1.75, 0.1, 0.12
_TITLE, _NAME, _TEXT = 10.0, 8.5, 7.0
_LINE = 1.45 / 72  # height of a line of text, in inches per point
_LETTER, _BOLD = 0.58 / 72, 0.70 / 72  # widths of a letter (upper bounds), likewise
_KEY = 0.16  # height of a line of the legend
_DPI = 128  # draws images of 224 pixels at their own resolution

_FAINT = {"color": "#444444"}

_GREEK = {"rho": "ρ", "eta": "η", "gamma": "γ", "alpha": "α"}
_TOGETHER = {
    "merged": "merged: each group is filled with its mean and outlined in one colour",
    "fused": "fused: dropped patches that are summed into one token, weighted by attention",
    "mixed": "mixed: each token is a mixture of all patches; those with the largest weight in it "
    "are a group, filled with its mean and outlined in one colour (a token may have none)",
}


def draw_patches(trace: TokenTrace, path: Path) -> Path:
    """Draw `patches_figure` to a PNG file and return its path. Equal input gives equal bytes.

    Raises:
        UserError: as `check_path`, before anything is drawn.
    """
    check_path(path)
    path.write_bytes(patches_png(trace))
    return path


def patches_png(trace: TokenTrace) -> bytes:
    """`patches_figure` as PNG, for example for a notebook."""
    drawn = io.BytesIO()
    patches_figure(trace).savefig(drawn, format="png", dpi=_DPI)
    return drawn.getvalue()


def check_path(path: Path) -> None:
    """Raises UserError if the suffix is not .png, or if the folder does not exist."""
    if path.suffix.lower() != ".png":
        raise UserError(
            f"the picture must be named FILE.png (got {str(path)!r})",
            Code.OUT_OF_RANGE,
            got=path.suffix,
            accepted=(".png",),
        )
    if not path.parent.is_dir():
        raise UserError(
            f"the folder of the picture does not exist (got {str(path)!r})",
            Code.NOT_FOUND,
            path=str(path.parent),
        )


def patches_figure(trace: TokenTrace) -> Figure:
    """The figure: one row per image, with the input and the image after each stage (at most 8).

    Patches that are kept are unchanged, dropped ones pale, merged ones filled with the mean of
    their group and outlined in its colour, fused ones tinted. Above a row are the predictions of
    the dense and the pruned model, below a stage the method's own figures of that block.
    """
    stages = trace.stages()
    blocks = _evenly(stages or [len(trace.images[0].patches) - 1])
    width = max(6.0, 2 * _MARGIN + (1 + len(blocks)) * (_CELL + _GAP) - _GAP)
    model = f" on {trace.model}" if trace.model else ""
    head = _wrap(f"{trace.recipe}{model}", width, _TITLE, _BOLD)
    rows = [_Row(image, blocks, trace, width) for image in trace.images]
    if all(row.titles == rows[0].titles for row in rows):
        for row in rows[1:]:  # equal titles are written once
            row.titles = []
    keys = {"\n".join(_wrap(k, width - 0.4, _TEXT)): v for k, v in _keys(trace, blocks).items()}
    foot = [line for text in _notes(trace, stages, blocks) for line in _wrap(text, width, _TEXT)]
    top = _MARGIN + len(head) * _TITLE * _LINE + 0.05
    under = _MARGIN + len(foot) * _TEXT * _LINE
    legend = sum(1 + key.count("\n") for key in keys) * _KEY
    height = top + sum(row.height for row in rows) + legend + 0.05 + under
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    _write(figure, _MARGIN, height - _MARGIN, "\n".join(head), _TITLE, fontweight="bold")
    y = height - top
    for row in rows:
        row.draw(figure, y)
        y -= row.height
    _write(figure, _MARGIN, under, "\n".join(foot), _TEXT, **_FAINT)
    if keys:
        figure.legend(
            handles=list(keys.values()),
            labels=list(keys),
            loc="lower left",
            bbox_to_anchor=(_MARGIN / width, (under + 0.03) / height),
            frameon=False,
            fontsize=_TEXT,
            borderaxespad=0,
            borderpad=0,
            labelspacing=0.4,
        )
    return figure


# ------------------------------------------------------------------------------------ content


def _evenly(stages: list[int]) -> list[int]:
    """At most COLUMNS evenly spaced stages, the first and the last among them."""
    chosen = np.linspace(0, len(stages) - 1, min(COLUMNS, len(stages))).round().astype(int)
    return [stages[i] for i in chosen]


def _notes(trace: TokenTrace, stages: list[int], blocks: list[int]) -> list[str]:
    if not stages:
        return ["All patches are kept in all blocks.", *trace.notes]
    some = len(stages) > len(blocks)
    columns = f"{len(blocks)} of the {len(stages)} blocks" if some else "the blocks"
    return [f"Columns: {columns} (from 0) that drop or merge patches.", *trace.notes]


def _keys(trace: TokenTrace, blocks: list[int]) -> dict[str, Patch]:
    """The legend: only what the drawn columns contain."""
    drawn = np.stack([image.group[block] for image in trace.images for block in blocks])
    keys = {}
    if any(image.joined(trace.together)[blocks].any() for image in trace.images):
        fused = trace.together == "fused"
        grey = np.full(3, 0.6)
        face = tinted(grey) if fused else grey
        edge = FUSED if fused else OUTLINES[0]
        keys[_TOGETHER[trace.together]] = Patch(facecolor=tuple(face), edgecolor=tuple(edge))
    if (drawn < 0).any():
        keys["dropped"] = Patch(facecolor=tuple(PAPER), edgecolor="#BBBBBB")
    return keys


# ------------------------------------------------------------------------------------- layout


def _wrap(text: str, width: float, points: float, letter: float = _LETTER) -> list[str]:
    """Lines that fit between margins, `width` inches apart."""
    return textwrap.wrap(text, max(20, int((width - 2 * _MARGIN) / (points * letter))))


def _write(figure: Figure, x: float, y: float, text: str, points: float, **look: Any) -> None:
    """Write text with its upper left corner at (x, y), in inches from the lower left."""
    width, height = figure.get_size_inches()
    figure.text(
        x / width, y / height, text, fontsize=points, ha="left", va="top", parse_math=False, **look
    )


class _Row:
    """An image and its stages, with the texts above and below; `titles` may be empty."""

    def __init__(
        self, image: ImageTrace, blocks: list[int], trace: TokenTrace, width: float
    ) -> None:
        self.image, self.blocks, self.trace = image, blocks, trace
        self.pixels = patch_of_pixels(image, trace).shape
        self.side = min(2 * _CELL, _CELL * self.pixels[0] / self.pixels[1])
        self.name = _wrap(summary(image), width, _NAME)
        of, left = math.prod(trace.grid), [(b, image.patches[b]) for b in blocks]
        self.titles = ["input"]
        self.titles += [f"block {b}: {n} of {of} ({100 * n / of:.0f} %)" for b, n in left]
        self.colours = group_colours(image, trace.together)
        self.figures = [self._figure_lines(image.figures[block]) for block in blocks]

    @property
    def height(self) -> float:
        lines = bool(self.titles) + max(len(lines) for lines in self.figures)
        return (len(self.name) * _NAME + lines * _TEXT) * _LINE + self.side + 0.18

    @staticmethod
    def _figure_lines(figures: dict[str, float]) -> list[str]:
        """The finite figures of a block, in lines."""
        shown = {_GREEK.get(k, k): v for k, v in figures.items() if math.isfinite(v)}
        text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        return _wrap(text, _CELL + 2 * _MARGIN, _TEXT)

    def draw(self, figure: Figure, y: float) -> None:
        """Draw below y, in inches from the bottom."""
        width, height = figure.get_size_inches()
        _write(figure, _MARGIN, y, "\n".join(self.name), _NAME)
        y -= len(self.name) * _NAME * _LINE
        for column, title in enumerate(self.titles):
            _write(figure, self._left(column), y, title, _TEXT, **_FAINT)
        y -= bool(self.titles) * _TEXT * _LINE
        for column in range(1 + len(self.blocks)):
            x = self._left(column)
            bounds = (x / width, (y - self.side) / height, _CELL / width, self.side / height)
            axes = figure.add_axes(bounds, label=f"{self.image.name}, column {column}")
            axes.set_axis_off()
            if column == 0:
                rows, columns = self.pixels
                self._show(axes, self.image.pixels[:rows, :columns] / 255)
            else:
                self._stage(axes, self.blocks[column - 1])
                text = "\n".join(self.figures[column - 1])
                _write(figure, x, y - self.side - 0.03, text, _TEXT, **_FAINT)

    @staticmethod
    def _left(column: int) -> float:
        return _MARGIN + column * (_CELL + _GAP)

    def _show(self, axes: Axes, picture: NDArray[np.float64]) -> None:
        rows, columns = self.pixels
        axes.imshow(picture, extent=(0, columns, rows, 0), interpolation="antialiased")

    def _stage(self, axes: Axes, block: int) -> None:
        self._show(axes, pixels_after(self.image, block, self.trace))
        points = 72 * self.side / self.trace.grid[0]  # height of a patch
        line = min(1.5, max(0.5, 0.1 * points))
        inset = 0.5 * line / points * self.trace.patch[0]
        colours = self.colours[block]
        segments, colours = outlines(self.image, block, colours, self.trace, inset)
        axes.add_collection(
            LineCollection(list(segments), colors=colours, linewidths=line, capstyle="butt"),
            autolim=False,
        )
