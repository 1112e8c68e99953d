"""Which patches a recipe keeps, merges or drops, as one PNG: the figures of the papers.

It draws what `search.compare.token_trace` followed and may not run, choose or change anything. It
keeps no global matplotlib state (no pyplot), so it can run in a worker or in a server's thread.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    owners_of,
    painted,
    tinted,
)
from vitpareto.methods import Recipe
from vitpareto.search.compare.token_trace import ImageTrace, Prediction, TokenTrace
from vitpareto.search.errors import UserError

#: Stages drawn beside the input; where there are more, some evenly, the first and last among them.
COLUMNS = 8
#: Lengths in inches, and the size of the texts in points.
_CELL, _GAP, _MARGIN = 1.75, 0.1, 0.12
_TITLE, _NAME, _TEXT = 10.0, 8.5, 7.0
_LINE = 1.45 / 72  # the height of a line of text, in inches a point
_LETTER, _BOLD = 0.58 / 72, 0.70 / 72  # the width of a letter, rather too wide, likewise
_KEY = 0.16  # the height of a line of the legend
_DPI = 128  # 224 pixels, the most usual side, are drawn pixel by pixel

_FAINT = {"color": "#444444"}

_GREEK = {"rho": "ρ", "eta": "η", "gamma": "γ", "alpha": "α"}
_TOGETHER = {
    "merged": "merged: each group is filled with its mean and outlined in one colour",
    "fused": "fused: dropped patches that live on in a token, their sum weighted by attention",
    "mixed": "mixed: each token is a mixture of all patches; those that weigh most in it are a "
    "group, filled with its mean and outlined in one colour (a token may have none)",
}


def draw_patches(followed: TokenTrace, path: Path) -> Path:
    """Draw `patches_figure` into `path`, a PNG, and return it; the same bytes for the same input.

    UserError, before anything is drawn, unless it is named .png in a folder that is there.
    """
    check_path(path)
    path.write_bytes(patches_png(followed))
    return path


def patches_png(followed: TokenTrace) -> bytes:
    """`patches_figure` as a PNG, for a notebook; an image of 224 pixels is as wide in it."""
    drawn = io.BytesIO()
    patches_figure(followed).savefig(drawn, format="png", dpi=_DPI)
    return drawn.getvalue()


def check_path(path: Path) -> None:
    """UserError where no picture can be written: another suffix, or no such folder."""
    if path.suffix.lower() != ".png":
        raise UserError(f"the picture is to be {str(path)!r}: accepted is FILE.png")
    if not path.parent.is_dir():
        raise UserError(f"the picture is to be {str(path)!r}: there is no folder {path.parent}")


def patches_figure(followed: TokenTrace) -> Figure:
    """The figure: a row an image, first as the model sees it, then after each stage (at most 8).

    Patches kept are as they are, dropped ones pale, merged ones filled with their group's mean and
    outlined in its colour, fused ones tinted in one colour. Above a row is what the dense and the
    pruned model make of the image, below a stage the method's own figures of that block.
    """
    stages = followed.stages()
    blocks = _evenly(stages or [len(followed.images[0].patches) - 1])
    width = max(6.0, 2 * _MARGIN + (1 + len(blocks)) * (_CELL + _GAP) - _GAP)
    model = f" on {followed.model}" if followed.model else ""
    head = _wrap(f"{followed.recipe}{model}", width, _TITLE, _BOLD)
    rows = [_Row(image, blocks, followed, width) for image in followed.images]
    if all(row.titles == rows[0].titles for row in rows):
        for row in rows[1:]:  # what holds for all is said once
            row.titles = []
    keys = {"\n".join(_wrap(k, width - 0.4, _TEXT)): v for k, v in _keys(followed, blocks).items()}
    foot = [line for text in _notes(followed, stages, blocks) for line in _wrap(text, width, _TEXT)]
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


@dataclass(frozen=True)
class BlockRow:
    """What one block did to the patches of one image.

    `patches` is how many tokens of patches are left, `dropped` how many of the original patches are
    in none of them, `joined` how many are in a token with others. `figures` are the method's own
    numbers of the block, None if not finite.
    """

    block: int
    patches: int
    dropped: int
    joined: int
    figures: Mapping[str, float | None]


@dataclass(frozen=True)
class PatchRow:
    """One image: both predictions, and every block, also those between the drawn columns.

    `together` is how the method joins patches ("merged", "fused" or "mixed").
    """

    image: str
    truth: str | None
    dense: Prediction
    pruned: Prediction
    model: str
    recipe: Recipe
    notes: tuple[str, ...]
    together: str
    blocks: tuple[BlockRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The row as plain values. The count of joined patches has the key `together` names."""
        return {
            "image": self.image,
            "truth": self.truth,
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "model": self.model,
            "recipe": self.recipe.to_dict(),
            "notes": list(self.notes),
            "blocks": [
                {
                    "block": b.block,
                    "patches": b.patches,
                    "dropped": b.dropped,
                    self.together: b.joined,
                    "figures": dict(b.figures),
                }
                for b in self.blocks
            ],
        }


def patch_rows(followed: TokenTrace) -> list[PatchRow]:
    """One row per image, for JSON."""
    return [
        PatchRow(
            image=image.name,
            truth=image.truth,
            dense=image.dense,
            pruned=image.pruned,
            model=followed.model,
            recipe=followed.recipe,
            notes=tuple(followed.notes),
            together=followed.together,
            blocks=_block_rows(image, image.joined(followed.together).sum(axis=1)),
        )
        for image in followed.images
    ]


def _block_rows(image: ImageTrace, joined: NDArray[np.int64]) -> tuple[BlockRow, ...]:
    return tuple(
        BlockRow(
            block=block,
            patches=patches,
            dropped=int((image.group[block] < 0).sum()),
            joined=int(joined[block]),
            figures={k: v if math.isfinite(v) else None for k, v in figures.items()},
        )
        for block, (patches, figures) in enumerate(zip(image.patches, image.figures, strict=True))
    )


def summary(image: ImageTrace) -> str:
    """One line: what both models make of the image."""

    def said(guess: Prediction) -> str:
        return f"{guess.name} ({100 * guess.probability:.0f} %)"

    truth = "" if image.truth is None else f" (truth: {image.truth})"
    return f"{image.name}{truth}   dense: {said(image.dense)} → pruned: {said(image.pruned)}"


# ------------------------------------------------------------------------------- what is drawn


def _evenly(stages: list[int]) -> list[int]:
    """At most COLUMNS of them, evenly, with the first and the last."""
    chosen = np.linspace(0, len(stages) - 1, min(COLUMNS, len(stages))).round().astype(int)
    return [stages[i] for i in chosen]


def _notes(followed: TokenTrace, stages: list[int], blocks: list[int]) -> list[str]:
    if not stages:
        return ["Every patch is kept in every block.", *followed.notes]
    several = len(stages) > len(blocks)
    columns = f"{len(blocks)} of the {len(stages)} blocks" if several else "the blocks"
    return [f"Columns: {columns} (from 0) that drop or join patches.", *followed.notes]


def _keys(followed: TokenTrace, blocks: list[int]) -> dict[str, Patch]:
    """The legend: only what the drawn columns hold."""
    drawn = np.stack([image.group[block] for image in followed.images for block in blocks])
    keys = {}
    if any(image.joined(followed.together)[blocks].any() for image in followed.images):
        fused = followed.together == "fused"
        grey = np.full(3, 0.6)
        face = tinted(grey) if fused else grey
        edge = FUSED if fused else OUTLINES[0]
        keys[_TOGETHER[followed.together]] = Patch(facecolor=tuple(face), edgecolor=tuple(edge))
    if (drawn < 0).any():
        keys["dropped"] = Patch(facecolor=tuple(PAPER), edgecolor="#BBBBBB")
    return keys


# --------------------------------------------------------------------------------- where it goes


def _wrap(text: str, width: float, points: float, letter: float = _LETTER) -> list[str]:
    """Lines that fit between the margins of a place `width` inches wide."""
    return textwrap.wrap(text, max(20, int((width - 2 * _MARGIN) / (points * letter))))


def _write(figure: Figure, x: float, y: float, text: str, points: float, **look: Any) -> None:
    """Text whose upper left corner is at x, y: inches from the figure's lower left."""
    width, height = figure.get_size_inches()
    figure.text(
        x / width, y / height, text, fontsize=points, ha="left", va="top", parse_math=False, **look
    )


class _Row:
    """An image and its stages, with the texts above and below; titles may be none."""

    def __init__(
        self, image: ImageTrace, blocks: list[int], followed: TokenTrace, width: float
    ) -> None:
        self.image, self.blocks, self.followed = image, blocks, followed
        self.pixels = owners_of(image, followed).shape
        self.side = min(2 * _CELL, _CELL * self.pixels[0] / self.pixels[1])
        self.name = _wrap(summary(image), width, _NAME)
        of, left = math.prod(followed.grid), [(b, image.patches[b]) for b in blocks]
        self.titles = ["input"]
        self.titles += [f"block {b}: {n} of {of} ({100 * n / of:.0f} %)" for b, n in left]
        self.colours = group_colours(image, followed.together)
        self.figures = [self._said(image.figures[block]) for block in blocks]

    @property
    def height(self) -> float:
        lines = bool(self.titles) + max(len(said) for said in self.figures)
        return (len(self.name) * _NAME + lines * _TEXT) * _LINE + self.side + 0.18

    @staticmethod
    def _said(figures: dict[str, float]) -> list[str]:
        """A block's figures in lines; one that is not a number says nothing."""
        shown = {_GREEK.get(k, k): v for k, v in figures.items() if math.isfinite(v)}
        text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        return _wrap(text, _CELL + 2 * _MARGIN, _TEXT)

    def draw(self, figure: Figure, y: float) -> None:
        """From y inches down."""
        width, height = figure.get_size_inches()
        _write(figure, _MARGIN, y, "\n".join(self.name), _NAME)
        y -= len(self.name) * _NAME * _LINE
        for column, title in enumerate(self.titles):
            _write(figure, self._left(column), y, title, _TEXT, **_FAINT)
        y -= bool(self.titles) * _TEXT * _LINE
        for column in range(1 + len(self.blocks)):
            x = self._left(column)
            place = (x / width, (y - self.side) / height, _CELL / width, self.side / height)
            axes = figure.add_axes(place, label=f"{self.image.name}, column {column}")
            axes.set_axis_off()
            if column == 0:
                rows, columns = self.pixels
                self._show(axes, self.image.pixels[:rows, :columns] / 255)
            else:
                self._stage(axes, self.blocks[column - 1])
                said = "\n".join(self.figures[column - 1])
                _write(figure, x, y - self.side - 0.03, said, _TEXT, **_FAINT)

    @staticmethod
    def _left(column: int) -> float:
        return _MARGIN + column * (_CELL + _GAP)

    def _show(self, axes: Axes, picture: NDArray[np.float64]) -> None:
        rows, columns = self.pixels
        axes.imshow(picture, extent=(0, columns, rows, 0), interpolation="antialiased")

    def _stage(self, axes: Axes, block: int) -> None:
        self._show(axes, painted(self.image, block, self.followed))
        points = 72 * self.side / self.followed.grid[0]  # a patch is that high
        line = min(1.5, max(0.5, 0.1 * points))
        inset = 0.5 * line / points * self.followed.patch[0]
        colours = self.colours[block]
        segments, colours = outlines(self.image, block, colours, self.followed, inset)
        axes.add_collection(
            LineCollection(list(segments), colors=colours, linewidths=line, capstyle="butt"),
            autolim=False,
        )
