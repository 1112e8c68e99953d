"""The marks and lines of the front's picture, each with the sample it adds to the legend.

Every function draws on given axes and returns the legend samples by label. Artists have a `gid`
that names what they are, so that an SVG can be styled and tests can find them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN
from matplotlib.transforms import ScaledTranslation

from vitpareto.dashboards.front_view import FrontView, PublishedPoint, trials_text
from vitpareto.dashboards.method_styles import CONTROL_FRONT, DENSE, MethodStyle
from vitpareto.search.study.front import knee_of
from vitpareto.search.study.results import TrialResult

Legend = dict[str, Line2D]

_FRONT: dict[str, Any] = {"color": "#333333", "linewidth": 1.5, "linestyle": "-"}
_CONTROL_FRONT: dict[str, Any] = {
    "color": CONTROL_FRONT,
    "linewidth": 2.0,
    "linestyle": (0, (4, 2)),
}
_RECOVERED: dict[str, Any] = {"color": "#0B6E4F", "linewidth": 1.5, "linestyle": (0, (5, 1.5))}
#: intervals on search images, if held-out ones are drawn in black
_SEARCH_INTERVAL = "#8A8A8A"
#: points to the right at which held-out accuracies are drawn, next to those on the search images
_CERTIFIED_OFFSET = 7.0
#: with more trials, marks are smaller
_CROWD = 150


def legend_sample(**options: Any) -> Line2D:
    """A mark for the legend."""
    return Line2D([], [], **{"linestyle": "none", "markersize": 8, **options})


def shortened(text: str, width: int = 26) -> str:
    """A label that fits next to the axes. matplotlib ignores labels that begin with "_"."""
    text = text.lstrip("_") or "?"
    return text if len(text) <= width else text[: width - 1] + "…"


def draw_trials(
    axes: Axes,
    results: Sequence[TrialResult],
    styles: Mapping[str, MethodStyle],
    view: FrontView,
) -> Legend:
    """Fully measured trials, and those that were stopped early, which are small and faint."""
    scale = 1.0 if len(results) <= _CROWD else 0.6
    for method, style in styles.items():
        for state in ("raced_out", "finished"):
            group = [r for r in results if r.method == method and r.state == state]
            _scatter(axes, group, style, view, scale)
    if not any(r.state == "raced_out" for r in results):
        return {}
    sample = legend_sample(marker="o", color="#AAAAAA", markersize=3.5)
    return {"stopped early (estimate)": sample}


def _scatter(
    axes: Axes, results: Sequence[TrialResult], style: MethodStyle, view: FrontView, scale: float
) -> None:
    """The trials of one method in one state. `scale` is a factor for the area of marks."""
    for below in (False, True):
        group = [r for r in results if view.is_below(r.values) == below]
        if not group:
            continue
        early = group[0].state == "raced_out"
        options: dict[str, Any] = {
            "marker": style.shape,
            "facecolors": "none" if style.control else style.colour,
            "edgecolors": style.colour if early else style.edge,
            "linewidths": 1.1 if style.control and not early else 0.5,
        }
        if below:
            options = {"marker": CARETDOWN, "color": style.colour}
        x, y = zip(*(view.position(r.values) for r in group), strict=True)
        axes.scatter(
            x,
            y,
            s=(9 if early and not below else 30) * scale,
            alpha=0.35 if early else 0.9,
            zorder=2 if early else 3,
            gid=f"{group[0].state}{':below' if below else ''}:{group[0].method}",
            **options,
        )


def _step(axes: Axes, members: Sequence[TrialResult], view: FrontView, **options: Any) -> None:
    """The best accuracy within each budget: constant up to the cost of the next member."""
    names = (view.horizontal.name, view.vertical.name)
    x, y = zip(*([r.values[name] for name in names] for r in members), strict=True)
    # in order of increasing cost in both directions of the axis, so a step follows its member
    axes.plot(x, y, drawstyle="steps-post", **options)


def draw_front(
    axes: Axes,
    members: Sequence[TrialResult],
    dense: TrialResult | None,
    styles: Mapping[str, MethodStyle],
    view: FrontView,
) -> Legend:
    """The front as a step line, its members as larger marks."""
    if not members or list(members) == [dense]:
        return {}
    _step(axes, members, view, zorder=4, gid="front", **_FRONT)
    for r in members:
        if r is not dense and not view.is_below(r.values):
            style = styles[r.method]
            axes.plot(
                *view.position(r.values),
                marker=style.shape,
                markersize=7.5,
                markerfacecolor="white" if style.control else style.colour,
                markeredgecolor=style.edge,
                markeredgewidth=1.2,
                zorder=5,
                gid=f"member:{r.trial}",
            )
    return {f"Pareto front ({trials_text(len(members))})": Line2D([], [], **_FRONT)}


def draw_control_front(axes: Axes, members: Sequence[TrialResult], view: FrontView) -> Legend:
    """The front of the controls as a dashed step line."""
    _step(axes, members, view, zorder=3.5, gid="control front", **_CONTROL_FRONT)
    label = f"front of the controls ({trials_text(len(members))})"
    return {label: Line2D([], [], **_CONTROL_FRONT)}


def draw_intervals(axes: Axes, members: Sequence[TrialResult], view: FrontView) -> Legend:
    """The 95 % intervals on the search images."""
    bars = [(view.position(r.values), i) for r in members if (i := view.interval(r)) is not None]
    if not bars:
        return {}
    x, y = np.array([position for position, _ in bars]).T
    low, high = np.array([interval for _, interval in bars]).T
    # a value may be outside its interval by a rounding error, and a bar cannot be negative
    halves = np.maximum([y - low, high - y], 0.0)
    certified = any(view.certified_interval(r) for r in members)
    colour = _SEARCH_INTERVAL if certified else "black"
    axes.errorbar(
        x, y, yerr=halves, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=4.5
    )
    label = "95 % interval, search images" if certified else "95 % interval"
    sample = legend_sample(marker="|", color=colour, markersize=11, markeredgewidth=1.2)
    return {label: sample}


def draw_certified(
    axes: Axes,
    members: Sequence[TrialResult],
    view: FrontView,
    colour: str = "black",
    suffix: str = "",
) -> Legend:
    """Top-1 and intervals on held-out images, shifted to the right on the page, not in data."""
    certified = [(r, i) for r in members if (i := view.certified_interval(r)) is not None]
    inch = axes.figure.dpi_scale_trans
    shifted = axes.transData + ScaledTranslation(_CERTIFIED_OFFSET / 72, 0, inch)
    options: dict[str, Any] = {
        "color": colour,
        "linewidth": 1.4,
        "zorder": 4.6,
        "transform": shifted,
    }
    for r, interval in certified:
        assert r.certified is not None
        x, gid = r.values[view.horizontal.name], f"certified{suffix}:{r.trial}"
        axes.plot([x, x], interval, marker="_", markersize=6, **options)
        axes.plot([x], [r.certified.top1], marker="D", markersize=4, gid=gid, **options)
    sample = legend_sample(marker="D", markersize=4, color=colour)
    return {"held-out images, joint 95 % interval": sample} if certified else {}


def draw_knee(
    axes: Axes, members: Sequence[TrialResult], dense: TrialResult | None, view: FrontView
) -> Legend:
    """A ring around the knee of the front, if it has one."""
    knee = knee_of(members, view.objectives, dense)
    if knee is None or view.is_below(knee.values):
        return {}
    ring: dict[str, Any] = {"marker": "o", "color": "black", "markerfacecolor": "none"}
    axes.plot(*view.position(knee.values), markersize=16, zorder=6, gid="knee", **ring)
    label = f"knee: {shortened(knee.method, 16)}, trial {knee.trial}\n{view.text(knee.values)}"
    return {label: legend_sample(**ring | {"markersize": 11})}


def draw_dense(axes: Axes, dense: TrialResult | None, view: FrontView) -> Legend:
    """The dense model as a star, with a line at its accuracy and one at its cost."""
    if dense is None:
        return {}
    x, y = view.position(dense.values)
    guide: dict[str, Any] = {"color": DENSE, "linewidth": 0.9, "linestyle": "--", "alpha": 0.6}
    axes.axhline(y, gid="dense accuracy", zorder=1.5, **guide)
    axes.axvline(x, gid="dense cost", zorder=1.5, **guide)
    star: dict[str, Any] = {
        "marker": "*",
        "markersize": 15,
        "color": DENSE,
        "markeredgecolor": "white",
    }
    axes.plot(x, y, zorder=7, gid="dense", **star)
    return {f"dense model\n{view.text(dense.values)}": legend_sample(**star)}


def draw_published(
    axes: Axes,
    published: Sequence[PublishedPoint],
    styles: Mapping[str, MethodStyle],
    view: FrontView,
) -> Legend:
    """Results from papers as crosses."""
    for point in published:
        axes.plot(
            *view.position(point.values),
            marker="x",
            color=styles[point.method].colour,
            markersize=8,
            markeredgewidth=2,
            zorder=4.8,
            gid=f"published:{point.method}",
        )
    sample = legend_sample(marker="x", color="black", markeredgewidth=2)
    return {"reported in a paper\n(method's colour)": sample} if published else {}


def draw_recovered(
    axes: Axes, recovered: Sequence[TrialResult], drawn: Sequence[TrialResult], view: FrontView
) -> Legend:
    """The front of fine-tuned trials, each with a line from the same trial before fine-tuning."""
    if not recovered:
        return {}
    members, colour = view.front(recovered), _RECOVERED["color"]
    before = {r.trial: r for r in drawn if r.state == "finished"}
    draw_certified(axes, members, view, colour, " recovered")
    _step(axes, members, view, zorder=4.2, gid="recovered front", **_RECOVERED)
    mark: dict[str, Any] = {
        "color": colour,
        "marker": "o",
        "markersize": 6,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
    }
    for r in recovered:
        x, y = view.position(r.values)
        axes.plot(x, y, zorder=6, gid=f"recovered:{r.trial}", **mark)
        if r.trial in before:
            origin = view.position(before[r.trial].values)
            axes.plot(
                *zip(origin, (x, y), strict=True),
                color=colour,
                linewidth=0.7,
                alpha=0.6,
                zorder=3.8,
                gid=f"recovery:{r.trial}",
            )
    return {f"recovered front ({trials_text(len(members))})": Line2D([], [], **_RECOVERED)}
