"""The front as one static picture (PNG or SVG) for reports, MLflow and READMEs.

Draws given results; measures and changes none. Uses no global state of matplotlib (no pyplot), so
that it can run in a worker or in a thread of a server.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitpareto.dashboards import front_artists as artists
from vitpareto.dashboards.front_axes import add_legend, set_axes
from vitpareto.dashboards.front_view import (
    FrontView,
    PublishedPoint,
    accuracy_floor,
    caption,
    has_values,
    trials_text,
)
from vitpareto.dashboards.method_styles import MethodStyle, is_control, styles_of
from vitpareto.search.errors import Code, UserError
from vitpareto.search.study.objectives import Objective, objectives_named
from vitpareto.search.study.results import TrialResult

#: accepted suffixes of file names
SUFFIXES = (".png", ".svg")
_WIDTH_INCHES = 9.0  # 900 px on a page at 100 dots per inch, which the font sizes are chosen for
_DPI = 200


def plot_front(
    results: Sequence[TrialResult],
    *,
    objectives: Sequence[str] = ("top1", "gmacs"),
    title: str,
    path: Path,
    published: Sequence[PublishedPoint] = (),
    is_control: Callable[[str], bool] = is_control,
    recovered: Sequence[TrialResult] = (),
) -> Path:
    """Draw `front_figure` to a file and return its path. A PNG is 1,800 px wide.

    Equal results give equal bytes.

    Raises:
        UserError: the suffix is not .png or .svg. Otherwise as `front_figure`.
        FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(
            f"the picture must be named FILE{' or FILE'.join(SUFFIXES)} (got {path.name!r})",
            Code.OUT_OF_RANGE,
            got=path.suffix,
            accepted=SUFFIXES,
        )
    figure = front_figure(
        results,
        objectives=objectives,
        title=title,
        published=published,
        is_control=is_control,
        recovered=recovered,
    )
    # without these an SVG has the time and random ids
    metadata = {"Date": None} if suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "vitpareto"}):
        figure.savefig(path, format=suffix[1:], dpi=_DPI, metadata=metadata)
    return path


def front_figure(
    results: Sequence[TrialResult],
    *,
    objectives: Sequence[str] = ("top1", "gmacs"),
    title: str,
    published: Sequence[PublishedPoint] = (),
    is_control: Callable[[str], bool] = is_control,
    recovered: Sequence[TrialResult] = (),
) -> Figure:
    """The figure of the front.

    Every trial with both values is a mark: fully measured trials in the colour and shape of their
    method, controls hollow and grey, trials that were stopped early small and faint at their
    estimate. An accuracy more than 30 points below the dense model is an arrow on the lower edge.
    Members of the front have their 95 % interval and, to the right, top-1 on the held-out images
    with its simultaneous interval. The controls have a front of their own. The caption accounts for
    every trial.

    Args:
        results: all results of the study.
        objectives: the objective of the vertical axis (an accuracy), then of the horizontal axis.
        title: text above the axes.
        published: results from papers, drawn as crosses.
        is_control: whether a method is a control.
        recovered: results after fine-tuning, drawn with a front of their own and a line from each
            trial's result before it.

    Raises:
        UserError: not exactly two objectives are named, or one does not exist.
        ValueError: a trial has no GMACs.
    """
    named = objectives_named(objectives)
    if len(named) != 2:
        raise UserError(
            "a picture needs two objectives, for the vertical and the horizontal axis "
            f"(got {len(named)}: {', '.join(objectives) or 'none'})",
            Code.OUT_OF_RANGE,
            objectives=tuple(objectives),
        )
    return _draw(_Content.of(results, named, published, is_control, recovered), results, title)


def _draw(content: _Content, results: Sequence[TrialResult], title: str) -> Figure:
    lines = textwrap.wrap(title, 70) or [""]
    rows = len(lines) + len(content.styles) + 13  # so that the legend is no taller than the axes
    figure = Figure(figsize=(_WIDTH_INCHES, max(5.6, 1.3 + 0.2 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    text = caption(results, content.drawn, content.members, content.dense, content.view)
    if content.recovered:
        text += f" {trials_text(len(content.recovered))} fine-tuned afterwards."
    left: dict[str, Any] = {"x": 0.01, "ha": "left"}
    figure.suptitle("\n".join(lines), fontsize=13, fontweight="bold", parse_math=False, **left)
    figure.supxlabel(textwrap.fill(text, 135), fontsize=9, color="#444444", **left)
    content.draw(axes)
    return figure


@dataclass(frozen=True)
class _Content:
    """What is drawn.

    Attributes:
        drawn: trials with both values, the dense model among them.
        dense: the first result of the dense model.
        members: the front of all fully measured trials.
        controls: the front of the controls; empty if it has one member, or is the whole front.
        published: results from papers with both values.
        recovered: fine-tuned trials with both values.
        styles: the style of each method.
        view: the objectives of the axes.
    """

    drawn: Sequence[TrialResult]
    dense: TrialResult | None
    members: Sequence[TrialResult]
    controls: Sequence[TrialResult]
    published: Sequence[PublishedPoint]
    recovered: Sequence[TrialResult]
    styles: Mapping[str, MethodStyle]
    view: FrontView

    @classmethod
    def of(
        cls,
        results: Sequence[TrialResult],
        objectives: Sequence[Objective],
        published: Sequence[PublishedPoint],
        is_control: Callable[[str], bool],
        recovered: Sequence[TrialResult],
    ) -> _Content:
        vertical, horizontal = objectives
        measured = [r for r in results if r.state in ("finished", "raced_out")]
        drawn = [r for r in measured if has_values(r.values, objectives)]
        points = [p for p in published if has_values(p.values, objectives)]
        finished = [r for r in drawn if r.state == "finished"]
        dense = min((r for r in finished if r.is_reference), key=lambda r: r.trial, default=None)
        view = FrontView(vertical, horizontal, accuracy_floor(drawn, points, vertical, dense))
        names = {r.method for r in drawn if r is not dense} | {p.method for p in points}
        controls = [r for r in finished if r.is_reference or is_control(r.method)]
        return cls(
            drawn=drawn,
            dense=dense,
            members=view.front(finished),
            controls=view.front(controls) if 1 < len(controls) < len(finished) else [],
            published=points,
            recovered=[
                r for r in recovered if r.state == "finished" and has_values(r.values, objectives)
            ],
            styles=styles_of(names, is_control),
            view=view,
        )

    def draw(self, axes: Axes) -> None:
        """Draw everything, and the legend in the order of importance."""
        dense, members, styles, view = self.dense, self.members, self.styles, self.view
        others = [r for r in self.drawn if r is not dense]
        stopped_early = artists.draw_trials(axes, others, styles, view)
        marks = artists.draw_front(axes, members, dense, styles, view)
        marks |= artists.draw_intervals(axes, members, view)
        marks |= artists.draw_certified(axes, members, view)
        marks |= artists.draw_knee(axes, members, dense, view)
        marks |= artists.draw_dense(axes, dense, view)
        if self.controls:
            marks |= artists.draw_control_front(axes, self.controls, view)
        marks |= stopped_early
        marks |= artists.draw_published(axes, self.published, styles, view)
        marks |= artists.draw_recovered(axes, self.recovered, self.drawn, view)
        with_intervals = [*members, *view.front(self.recovered)]
        set_axes(axes, [*self.drawn, *self.recovered], with_intervals, self.published, view)
        add_legend(axes, marks, styles)
