"""Limits, labels and legend of the front's picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from vitpareto.dashboards.front_artists import Legend, legend_sample, shortened
from vitpareto.dashboards.front_view import FrontView, PublishedPoint
from vitpareto.dashboards.method_styles import MethodStyle
from vitpareto.search.study.results import TrialResult


def set_axes(
    axes: Axes,
    drawn: Sequence[TrialResult],
    members: Sequence[TrialResult],
    published: Sequence[PublishedPoint],
    view: FrontView,
) -> None:
    """Set limits with a margin around all marks and intervals, labels and grid.

    Args:
        axes: the axes.
        drawn: all trials with a mark.
        members: trials with intervals.
        published: results from papers with a mark.
        view: the objectives of the axes.
    """
    values = [r.values for r in drawn] + [p.values for p in published]
    positions = [view.position(v) for v in values]
    ends = [end for r in members for end in view.interval(r) or ()]
    ends += [end for r in members for end in view.certified_interval(r) or ()]
    axes.set_xlim(*_limits([x for x, _ in positions]))
    low, high = _limits([y for _, y in positions] + ends)
    if view.floor is not None:  # the lower edge is for arrows only
        low = view.floor - 0.015 * (high - view.floor)
    axes.set_ylim(low, high)
    for objective, set_label in (
        (view.horizontal, axes.set_xlabel),
        (view.vertical, axes.set_ylabel),
    ):
        better = "lower" if objective.direction == "minimize" else "higher"
        set_label(f"{objective.label} ({objective.unit}), {better} is better", fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper limit with a margin, also if there are no values or all are equal."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def add_legend(axes: Axes, marks: Legend, styles: Mapping[str, MethodStyle]) -> None:
    """One column to the right of the axes: marks, then methods, then controls."""
    handles, labels, headings = list(marks.values()), list(marks), []
    for heading, control in (("Methods", False), ("Controls (baselines)", True)):
        group = {m: style for m, style in styles.items() if style.control == control}
        if not group:
            continue
        headings.append(len(labels))
        handles.append(legend_sample())
        labels += [heading, *map(shortened, group)]
        for style in group.values():
            face = "none" if control else style.colour
            handles.append(
                legend_sample(
                    marker=style.shape, markersize=7, color=style.edge, markerfacecolor=face
                )
            )
    if not handles:
        return
    legend = axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.01),
        frameon=False,
        fontsize=9.5,
        labelspacing=0.5,
    )
    for i, text in enumerate(legend.get_texts()):
        text.set_parse_math(False)
        if i in headings:
            text.set_fontweight("bold")
