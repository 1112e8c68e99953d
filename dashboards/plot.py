"""The front as one static picture (PNG or SVG) for reports, MLflow and READMEs.

It draws results it is given and may not measure, choose or change any. It keeps no global
matplotlib state (no pyplot), so it can run in a worker or in a server's thread.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWN
from matplotlib.transforms import ScaledTranslation

from vitpareto.dashboards.styles import CONTROL_FRONT, CONTROLS, DENSE, Style, is_control, styles_of
from vitpareto.search.study.front import front_of, knee_of
from vitpareto.search.study.objectives import ACCURACIES, Objective, objectives_named
from vitpareto.search.study.results import TrialResult

#: What the file name may end in.
SUFFIXES = (".png", ".svg")

_FRONT: dict[str, Any] = {"color": "#333333", "linewidth": 1.5, "linestyle": "-"}
_CONTROL_FRONT: dict[str, Any] = {
    "color": CONTROL_FRONT,
    "linewidth": 2.0,
    "linestyle": (0, (4, 2)),
}
_RECOVERED: dict[str, Any] = {"color": "#0B6E4F", "linewidth": 1.5, "linestyle": (0, (5, 1.5))}
_SEARCH_BAR: dict[str, Any] = {"color": "#8A8A8A", "linewidth": 1.2}
#: held-out accuracies stand beside the search's, so many points to the right of their cost
_BESIDE = 7.0
#: Accuracies further below the dense model than this are drawn as arrows on the lower edge: one
#: ruined recipe at 3 % would otherwise squeeze every difference that matters into a few pixels.
_DEPTH = 30.0
_WIDTH_INCHES = 9.0  # at 100 dots an inch the 900 px that the font sizes are meant for
_DPI = 200


@dataclass(frozen=True)
class PublishedPoint:
    """A number as a paper reports it: `values` by objective name, in the objectives' units."""

    method: str
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _View:
    """What the axes show; `floor` is the accuracy drawn at the lower edge, if any is below it."""

    vertical: Objective
    horizontal: Objective
    floor: float | None

    @property
    def objectives(self) -> tuple[Objective, Objective]:
        return self.vertical, self.horizontal

    def sunk(self, values: Mapping[str, float]) -> bool:
        return self.floor is not None and values[self.vertical.name] < self.floor

    def spot(self, values: Mapping[str, float]) -> tuple[float, float]:
        """(x, y) in data coordinates, on the lower edge where the accuracy is below it."""
        y = values[self.vertical.name]
        return values[self.horizontal.name], y if self.floor is None else max(y, self.floor)

    def text(self, values: Mapping[str, float]) -> str:
        return ", ".join(f"{values[o.name]:.4g} {o.unit}" for o in self.objectives)

    def front(self, results: Sequence[TrialResult]) -> list[TrialResult]:
        """The front of these along the horizontal axis, cheapest first."""
        sign, name = self.horizontal.sign, self.horizontal.name
        return sorted(front_of(results, self.objectives), key=lambda r: sign * r.values[name])


def plot_front(
    results: Sequence[TrialResult],
    *,
    objectives: Sequence[str] = ("top1", "gmacs"),
    title: str,
    path: Path,
    published: Sequence[PublishedPoint] = (),
    controls: frozenset[str] = CONTROLS,
    recovered: Sequence[TrialResult] = (),
) -> Path:
    """Draw `front_figure` into `path` and return it; a PNG is 1,800 px wide, for 900 on a page.

    ValueError if the suffix is neither .png nor .svg, before anything is drawn; the folder must
    exist (else FileNotFoundError). Otherwise as `front_figure`.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(
            f"cannot draw {path.name!r}: accepted are names in {' or '.join(SUFFIXES)}, "
            f"got {path.suffix!r}"
        )
    figure = front_figure(
        results, objectives=objectives, title=title, published=published, controls=controls,
        recovered=recovered,
    )  # fmt: skip
    # An SVG carries the date of drawing and random ids unless told otherwise; the picture of the
    # same results should be the same file.
    metadata = {"Date": None} if kind == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "vitpareto"}):
        figure.savefig(path, format=kind[1:], dpi=_DPI, metadata=metadata)
    return path


def front_figure(
    results: Sequence[TrialResult],
    *,
    objectives: Sequence[str] = ("top1", "gmacs"),
    title: str,
    published: Sequence[PublishedPoint] = (),
    controls: frozenset[str] = CONTROLS,
    recovered: Sequence[TrialResult] = (),
) -> Figure:
    """The figure: `objectives` names the vertical axis (accuracy), then the horizontal (cost).

    Every trial that has both values is a mark: fully measured ones in the method's colour and
    shape, controls hollow and grey, those stopped early small and faint (at their estimate). The
    front runs over all fully measured trials, with the 95 % interval where the result carries one
    for top-1; beside a certified member, a little to the right of its cost, stands its top-1 on the
    held-out images, with the interval that holds for all at once. The controls' front is a dashed
    line of its own. The dense model (the first, if several) is a star. An accuracy more than 30
    points below it is an arrow on the lower edge. A trial without both values, or with
    one that is not finite, is not drawn; nor is such a published point. `recovered` are trials
    after fine-tuning: their front has a line of its own, and a thin one from where each was. The
    line beneath accounts for every trial.

    ValueError unless two known objectives are named, or if a trial drawn has no gmacs.
    """
    named = objectives_named(objectives)
    if len(named) != 2:
        raise ValueError(
            f"a picture has two objectives, vertical then horizontal; got {len(named)}: "
            f"{', '.join(objectives) or 'none'}"
        )
    drawn = [r for r in results if r.state in ("finished", "raced_out") and _has(r.values, named)]
    papers = [p for p in published if _has(p.values, named)]
    healed = [r for r in recovered if r.state == "finished" and _has(r.values, named)]
    finished = [r for r in drawn if r.state == "finished"]
    dense = min((r for r in finished if r.is_reference), key=lambda r: r.trial, default=None)
    others = [r for r in drawn if r is not dense]
    view = _View(*named, _floor(drawn, papers, named[0], dense))
    styles = styles_of({r.method for r in others} | {p.method for p in papers}, controls)
    members = view.front(finished)

    lines = textwrap.wrap(title, 70) or [""]
    rows = len(lines) + len(styles) + 13  # so that the legend is no taller than the axes
    figure = Figure(figsize=(_WIDTH_INCHES, max(5.6, 1.3 + 0.2 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    look: dict[str, Any] = {"x": 0.01, "ha": "left"}
    figure.suptitle("\n".join(lines), fontsize=13, fontweight="bold", parse_math=False, **look)
    account = _account(results, drawn, members, dense, view)
    if healed:
        account += f" {_trials(len(healed))} fine-tuned afterwards."
    account = textwrap.fill(account, 135)
    figure.supxlabel(account, fontsize=9, color="#444444", **look)

    for method, style in styles.items():
        for state in ("raced_out", "finished"):
            some = [r for r in others if r.method == method and r.state == state]
            _scatter(axes, some, style, view, crowd=1.0 if len(others) <= 150 else 0.6)
    marks = _draw_front(axes, members, dense, styles, view)
    marks |= _draw_intervals(axes, members, view)
    marks |= _draw_certified(axes, members, view)
    marks |= _draw_knee(axes, members, dense, view)
    marks |= _draw_dense(axes, dense, view)
    plain = [r for r in finished if is_control(r.method, controls) or r.is_reference]
    if 1 < len(plain) < len(finished):
        marks |= _draw_control_front(axes, view.front(plain), view)
    if any(r.state == "raced_out" for r in others):
        marks["stopped early (estimate)"] = _mark(marker="o", color="#AAAAAA", markersize=3.5)
    marks |= _draw_published(axes, papers, styles, view)
    marks |= _draw_recovered(axes, healed, drawn, view)
    _set_axes(axes, [*drawn, *healed], [*members, *view.front(healed)], papers, view)
    _legend(axes, marks, styles)
    return figure


# -------------------------------------------------------------------------- what is to be drawn


def _has(values: Mapping[str, float], objectives: Sequence[Objective]) -> bool:
    return all(np.isfinite(values.get(o.name, np.nan)) for o in objectives)


def _floor(
    drawn: list[TrialResult],
    papers: list[PublishedPoint],
    vertical: Objective,
    dense: TrialResult | None,
) -> float | None:
    """The accuracy below which trials become arrows, or None where none does.

    None too where most trials would: then they are the picture.
    """
    if vertical.name not in ACCURACIES or dense is None:
        return None
    limits = [dense.values[vertical.name] - _DEPTH, *(p.values[vertical.name] for p in papers)]
    below = sum(r.values[vertical.name] < min(limits) for r in drawn)
    return min(limits) if 0 < below <= len(drawn) / 2 else None


def _trials(n: int) -> str:
    return f"{n} trial" if n == 1 else f"{n} trials"


def _account(
    results: Sequence[TrialResult],
    drawn: list[TrialResult],
    members: list[TrialResult],
    dense: TrialResult | None,
    view: _View,
) -> str:
    """What became of every trial: drawn, on another, on the edge, or not drawn and why."""
    states = Counter(r.state for r in drawn)
    parts = [f"{_trials(states['finished'])} measured in full"]
    if states["raced_out"]:
        parts.append(f"{states['raced_out']} stopped early")
    ids = {id(r) for r in drawn}
    missing: Counter[str] = Counter()
    for r in results:
        if r.state in ("failed", "running"):
            missing[r.state] += 1
        elif id(r) not in ids:
            lacks = next(o.name for o in view.objectives if not _has(r.values, (o,)))
            missing[f"without {lacks}"] += 1
    if missing:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(missing.items()))
        parts.append(f"not drawn: {kinds}")
    sentences = ["; ".join(parts)]
    sunk = [r.values[view.vertical.name] for r in drawn if view.sunk(r.values)]
    if sunk:
        sentences.append(
            f"Arrows on the lower edge: {_trials(len(sunk))} under {view.floor:.4g} %, "
            f"down to {min(sunk):.3g} %"
        )
    hidden = len(drawn) - len({tuple(r.values[o.name] for o in view.objectives) for r in drawn})
    if hidden:
        sentences.append(f"{_trials(hidden)} exactly behind another")
    if not members:
        sentences.append("No front yet")
    elif members == [dense]:
        alone = states["finished"] == 1
        sentences.append(
            "No front yet: no pruned model was measured in full"
            if alone
            else "No front: no trial costs less, or is better, than the dense model"
        )
    return ". ".join(sentences) + "."


# ---------------------------------------------------------------------------------- drawing it


def _mark(**look: Any) -> Line2D:
    """A legend sample."""
    return Line2D([], [], **{"linestyle": "none", "markersize": 8, **look})


def _scatter(
    axes: Axes, results: list[TrialResult], style: Style, view: _View, crowd: float
) -> None:
    """One method's trials in one state; `crowd` shrinks marks where there are many."""
    for sunk in (False, True):
        some = [r for r in results if view.sunk(r.values) == sunk]
        if not some:
            continue
        early = some[0].state == "raced_out"
        look: dict[str, Any] = {
            "marker": style.shape,
            "facecolors": "none" if style.control else style.colour,
            "edgecolors": style.colour if early else style.edge,
            "linewidths": 1.1 if style.control and not early else 0.5,
        }
        if sunk:
            look = {"marker": CARETDOWN, "color": style.colour}
        x, y = zip(*(view.spot(r.values) for r in some), strict=True)
        axes.scatter(
            x,
            y,
            s=(9 if early and not sunk else 30) * crowd,
            alpha=0.35 if early else 0.9,
            zorder=2 if early else 3,
            gid=f"{some[0].state}{':sunk' if sunk else ''}:{some[0].method}",
            **look,
        )


def _step(axes: Axes, members: list[TrialResult], view: _View, **look: Any) -> None:
    """What the best member within each budget reaches: flat up to the next member's cost."""
    x, y = zip(*([r.values[o.name] for o in view.objectives[::-1]] for r in members), strict=True)
    # `members` runs from cheap to dear, whichever way the axis does; so a step follows its member.
    axes.plot(x, y, drawstyle="steps-post", **look)


def _draw_front(
    axes: Axes,
    members: list[TrialResult],
    dense: TrialResult | None,
    styles: Mapping[str, Style],
    view: _View,
) -> dict[str, Line2D]:
    if not members or members == [dense]:
        return {}
    _step(axes, members, view, zorder=4, gid="front", **_FRONT)
    for r in members:
        if r is not dense and not view.sunk(r.values):
            style = styles[r.method]
            axes.plot(
                *view.spot(r.values),
                marker=style.shape,
                markersize=7.5,
                markerfacecolor="white" if style.control else style.colour,
                markeredgecolor=style.edge,
                markeredgewidth=1.2,
                zorder=5,
                gid=f"member:{r.trial}",
            )
    return {f"Pareto front ({_trials(len(members))})": Line2D([], [], **_FRONT)}


def _interval(result: TrialResult, view: _View) -> tuple[float, float] | None:
    """The 95 % interval to draw, or None where there is none or the trial is on the edge."""
    low, high = result.top1_low, result.top1_high
    if view.vertical.name != "top1" or view.sunk(result.values) or low is None or high is None:
        return None
    return low, high


def _draw_intervals(axes: Axes, members: list[TrialResult], view: _View) -> dict[str, Line2D]:
    barred = [(view.spot(r.values), i) for r in members if (i := _interval(r, view)) is not None]
    if not barred:
        return {}
    x, y = np.array([spot for spot, _ in barred]).T
    low, high = np.array([interval for _, interval in barred]).T
    # A value may sit a rounding error outside its interval; a bar has no negative half.
    halves = np.maximum([y - low, high - y], 0.0)
    certified = any(_certified_interval(r, view) for r in members)
    colour = _SEARCH_BAR["color"] if certified else "black"
    axes.errorbar(
        x, y, yerr=halves, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=4.5
    )
    label = "95 % interval, search images" if certified else "95 % interval"
    return {label: _mark(marker="|", color=colour, markersize=11, markeredgewidth=1.2)}


def _certified_interval(result: TrialResult, view: _View) -> tuple[float, float] | None:
    """The simultaneous interval on held-out images, or None where none is drawn."""
    own = result.certified
    if own is None or view.vertical.name != "top1" or view.sunk(result.values):
        return None
    return own.low, own.high


def _draw_certified(
    axes: Axes, members: list[TrialResult], view: _View, colour: str = "black", of: str = ""
) -> dict[str, Line2D]:
    """Top-1 on held-out images, beside the marks: the data's y, and x moved on the page alone."""
    barred = [(r, i) for r in members if (i := _certified_interval(r, view)) is not None]
    inch = axes.figure.dpi_scale_trans
    beside = axes.transData + ScaledTranslation(_BESIDE / 72, 0, inch)
    look: dict[str, Any] = {"color": colour, "linewidth": 1.4, "zorder": 4.6}
    for r, ends in barred:
        assert r.certified is not None
        x, own = r.values[view.horizontal.name], r.certified.top1
        axes.plot([x, x], ends, marker="_", markersize=6, transform=beside, **look)
        axes.plot(
            [x], [own], marker="D", markersize=4, transform=beside,
            gid=f"certified{of}:{r.trial}", **look,
        )  # fmt: skip
    sample = _mark(marker="D", markersize=4, color=colour)
    return {"held-out images, 95 % for all at once": sample} if barred else {}


def _draw_control_front(axes: Axes, members: list[TrialResult], view: _View) -> dict[str, Line2D]:
    _step(axes, members, view, zorder=3.5, gid="control front", **_CONTROL_FRONT)
    return {f"front of the controls ({_trials(len(members))})": Line2D([], [], **_CONTROL_FRONT)}


def _draw_knee(
    axes: Axes, members: list[TrialResult], dense: TrialResult | None, view: _View
) -> dict[str, Line2D]:
    r = knee_of(members, view.objectives, dense)
    if r is None or view.sunk(r.values):
        return {}
    ring: dict[str, Any] = {"marker": "o", "color": "black", "markerfacecolor": "none"}
    axes.plot(*view.spot(r.values), markersize=16, zorder=6, gid="knee", **ring)
    label = f"knee: {_short(r.method, 16)}, trial {r.trial}\n{view.text(r.values)}"
    return {label: _mark(**ring | {"markersize": 11})}


def _draw_dense(axes: Axes, dense: TrialResult | None, view: _View) -> dict[str, Line2D]:
    if dense is None:
        return {}
    x, y = view.spot(dense.values)
    guide: dict[str, Any] = {"color": DENSE, "linewidth": 0.9, "linestyle": "--", "alpha": 0.6}
    axes.axhline(y, gid="dense accuracy", zorder=1.5, **guide)
    axes.axvline(x, gid="dense cost", zorder=1.5, **guide)
    star: dict[str, Any] = {"marker": "*", "markersize": 15, "color": DENSE}
    star["markeredgecolor"] = "white"
    axes.plot(x, y, zorder=7, gid="dense", **star)
    return {f"dense model\n{view.text(dense.values)}": _mark(**star)}


def _draw_published(
    axes: Axes, papers: list[PublishedPoint], styles: Mapping[str, Style], view: _View
) -> dict[str, Line2D]:
    for paper in papers:
        axes.plot(
            *view.spot(paper.values),
            marker="x",
            color=styles[paper.method].colour,
            markersize=8,
            markeredgewidth=2,
            zorder=4.8,
            gid=f"published:{paper.method}",
        )
    sample = _mark(marker="x", color="black", markeredgewidth=2)
    return {"reported in a paper\n(method's colour)": sample} if papers else {}


def _draw_recovered(
    axes: Axes, healed: list[TrialResult], drawn: list[TrialResult], view: _View
) -> dict[str, Line2D]:
    """The recovered front, and where each of its trials came from."""
    if not healed:
        return {}
    members, before = view.front(healed), {r.trial: r for r in drawn if r.state == "finished"}
    _draw_certified(axes, members, view, _RECOVERED["color"], " recovered")
    _step(axes, members, view, zorder=4.2, gid="recovered front", **_RECOVERED)
    look = {"color": _RECOVERED["color"], "markeredgecolor": "white", "markeredgewidth": 0.8}
    for r in healed:
        x, y = view.spot(r.values)
        axes.plot(x, y, marker="o", markersize=6, zorder=6, gid=f"recovered:{r.trial}", **look)
        if r.trial in before:
            origin = view.spot(before[r.trial].values)
            axes.plot(*zip(origin, (x, y), strict=True), color=look["color"], linewidth=0.7,
                      alpha=0.6, zorder=3.8, gid=f"recovery:{r.trial}")  # fmt: skip
    return {f"recovered front ({_trials(len(members))})": Line2D([], [], **_RECOVERED)}


def _set_axes(
    axes: Axes,
    drawn: list[TrialResult],
    members: list[TrialResult],
    papers: list[PublishedPoint],
    view: _View,
) -> None:
    """Limits with room around every mark and bar (also where all are identical), labels, grid."""

    def limits(values: list[float]) -> tuple[float, float]:
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        return low - room, high + room

    spots = [view.spot(v) for v in [r.values for r in drawn] + [p.values for p in papers]]
    bars = [end for r in members for end in _interval(r, view) or ()]
    bars += [end for r in members for end in _certified_interval(r, view) or ()]
    axes.set_xlim(*limits([x for x, _ in spots]))
    low, high = limits([y for _, y in spots] + bars)
    if view.floor is not None:  # room for the arrows' tips, no more: the edge is theirs
        low = view.floor - 0.015 * (high - view.floor)
    axes.set_ylim(low, high)
    for objective, put in ((view.horizontal, axes.set_xlabel), (view.vertical, axes.set_ylabel)):
        better = "lower" if objective.direction == "minimize" else "higher"
        put(f"{objective.label} ({objective.unit}), {better} is better", fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(text: str, width: int = 26) -> str:
    """A label that fits beside the axes; matplotlib drops labels that begin with "_"."""
    text = text.lstrip("_") or "?"
    return text if len(text) <= width else text[: width - 1] + "…"


def _legend(axes: Axes, marks: Mapping[str, Line2D], styles: Mapping[str, Style]) -> None:
    """One column to the right of the axes: what the marks mean, the methods, the controls."""
    handles, labels, headings = list(marks.values()), list(marks), []
    for heading, control in (("Methods", False), ("Controls, to be beaten", True)):
        some = {m: style for m, style in styles.items() if style.control == control}
        if not some:
            continue
        headings.append(len(labels))
        handles.append(_mark())
        labels += [heading, *map(_short, some)]
        for style in some.values():
            face = "none" if control else style.colour
            handles.append(
                _mark(marker=style.shape, markersize=7, color=style.edge, markerfacecolor=face)
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
