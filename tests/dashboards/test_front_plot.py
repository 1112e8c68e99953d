"""The picture of the front: marks, lines, caption and legend; no text is clipped or overlaps."""

from __future__ import annotations

import itertools
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure

from tests.refusals import refused
from vitpareto import methods
from vitpareto.dashboards.front_plot import PublishedPoint, front_figure, plot_front
from vitpareto.search.errors import Code, UserError
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import TrialResult, TrialState

pytestmark = pytest.mark.filterwarnings("error")

CONTROLS = {n for n in methods.names() if methods.get(n).control} - {"dense"}
FEW = ("tome", "tram", "rajni", "topk", "random", "resize")
TWELVE = ("ats", "dynamicvit", "evit", "nvit", "patchmerger", "ppt", "rajni", "revit", "tnt",
          "tome", "topk", "tram")  # fmt: skip
STATES: tuple[TrialState, ...] = ("finished", "raced_out", "failed", "running")
TITLE = "deit_small_patch16_224 on ImageNet-1k (10,000 search images)"


def recipe_of(method: str) -> RecordedRecipe:
    return (
        RecordedRecipe() if method == "dense" else RecordedRecipe(tokens=RecordedStep(method, {}))
    )


def trial(
    number: int, method: str, top1: float, gmacs: float, state: TrialState = "finished", **more
) -> TrialResult:
    low, high = wilson_interval(round(100 * top1), 10_000)
    return TrialResult(
        number,
        state,
        recipe_of(method),
        key=str(number),
        values={"top1": top1, "gmacs": gmacs, **more} if state in STATES[:2] else {},
        top1_low=low,
        top1_high=high,
    )


def study(trials: int, methods: tuple[str, ...] = FEW, ruined: float = 0.0) -> list[TrialResult]:
    """A dense model and `trials - 1` others; a share `ruined` loses 40 points and more."""
    rng = np.random.default_rng(trials)
    results = [trial(0, "dense", 79.85, 4.608)]
    for i in range(1, trials):
        kept = rng.uniform(0.3, 1.02)
        top1 = 79.8 - 20 * (1 - kept) ** 2 - abs(rng.normal())
        top1 -= rng.uniform(40, 60) if rng.random() < ruined else 0.0
        state = STATES[rng.choice(4, p=[0.55, 0.38, 0.05, 0.02])]
        results.append(trial(i, methods[i % len(methods)], top1, 4.608 * kept, state))
    return results


def draw(results: list[TrialResult], **options) -> Figure:
    return front_figure(results, title=TITLE, **options)


def marks(figure: Figure, start: str) -> list:
    """The artists whose id begins so."""
    artists = [*figure.axes[0].collections, *figure.axes[0].lines]
    return [a for a in artists if (a.get_gid() or "").startswith(start)]


def drawn(figure: Figure, start: str) -> int:
    return sum(len(a.get_offsets()) for a in marks(figure, start))


def legend(figure: Figure) -> list[str]:
    found = figure.axes[0].get_legend()
    return [t.get_text() for t in found.get_texts()] if found else []


def caption(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def assert_tidy(figure: Figure) -> None:
    """All text lies in the figure; title, caption, legend and axes do not overlap."""
    figure.canvas.draw()
    axes = figure.axes[0]
    outer = figure.bbox.padded(1)
    titles: Any = figure  # matplotlib gives their texts in public, the artists not
    boxes = {
        "axes": axes.get_window_extent(),
        "title": titles._suptitle.get_window_extent(),
        "caption": titles._supxlabel.get_window_extent(),
        "x label": axes.xaxis.label.get_window_extent(),
        "y label": axes.yaxis.label.get_window_extent(),
    }
    if found := axes.get_legend():
        boxes["legend"] = found.get_window_extent()
    for name, box in boxes.items():
        assert outer.x0 <= box.x0 and box.x1 <= outer.x1, f"{name} is clipped: {box}, {outer}"
        assert outer.y0 <= box.y0 and box.y1 <= outer.y1, f"{name} is clipped: {box}, {outer}"
    for (a, one), (b, other) in itertools.combinations(boxes.items(), 2):
        # An empty text has a point for a box.
        assert not one.overlaps(other) or 0 in (one.width, other.width), f"{a} lies on {b}"
    assert axes.get_window_extent().width > 0.5 * figure.bbox.width


# -------------------------------------------------------------------------- what is in the figure


def test_measured_trials_have_a_mark_and_others_are_counted():
    results = study(60)
    figure = draw(results)
    states = Counter(r.state for r in results)
    assert min(states.values()) > 0 and len(states) == 4
    assert drawn(figure, "finished:") == states["finished"] - 1  # the dense model is a star
    assert drawn(figure, "raced_out:") == states["raced_out"]
    assert len(marks(figure, "dense")) == 3  # the star and two guides
    assert caption(figure) == (
        f"{states['finished']} trials fully measured; {states['raced_out']} stopped early; "
        f"not drawn: {states['failed']} failed, {states['running']} running."
    )
    assert_tidy(figure)


def test_the_front_is_a_step_line_through_its_members_with_their_intervals():
    results = study(60)
    figure = draw(results)
    members = front_of(results, objectives_named(("top1", "gmacs")))
    (line,) = marks(figure, "front")
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xdata() == pytest.approx([r.values["gmacs"] for r in members])
    assert line.get_ydata() == pytest.approx([r.values["top1"] for r in members])
    assert {a.get_gid() for a in marks(figure, "member:")} == {
        f"member:{r.trial}" for r in members if not r.is_reference
    }
    bars: Any
    (bars,) = figure.axes[0].containers
    ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    assert ends == pytest.approx(np.array([(r.top1_low, r.top1_high) for r in members]))
    low, high = figure.axes[0].get_ylim()
    assert low < ends.min() and ends.max() < high
    assert {f"Pareto front ({len(members)} trials)", "95 % interval"} <= set(legend(figure))


def test_a_front_without_intervals_has_no_bars():
    results = [
        TrialResult(i, "finished", recipe_of("tome"), "k", {"top1": t, "gmacs": g})
        for i, (t, g) in enumerate([(70.0, 1.0), (79.0, 2.0), (80.0, 4.0)])
    ]
    figure = draw(results)
    assert not figure.axes[0].containers and "95 % interval" not in legend(figure)
    (ring,) = marks(figure, "knee")
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2.0, 79.0)
    assert "knee: tome, trial 1\n79 %, 2 G" in legend(figure)


def test_two_members_have_no_knee():
    figure = draw([trial(0, "dense", 80.0, 4.6), trial(1, "tome", 75.0, 3.0)])
    assert marks(figure, "front") and not marks(figure, "knee")


def test_controls_are_hollow_and_grey_with_a_separate_front():
    figure = draw(study(60))
    for artist in marks(figure, "finished:"):
        method = artist.get_gid().split(":")[-1]
        hollow = len(artist.get_facecolor()) == 0
        assert hollow == (method in CONTROLS)
    (random,) = marks(figure, "finished:random")
    red, green, blue, _ = random.get_edgecolor()[0]
    assert red == green == blue
    assert len(marks(figure, "control front")) == 1
    texts = legend(figure)
    assert texts.index("Methods") < texts.index("tome") < texts.index("Controls (baselines)")
    assert texts[-2:] == ["random", "resize"]


def test_recovered_trials_have_a_front_and_lines_from_their_origin():
    results = study(60)
    members = front_of(results, objectives_named(("top1", "gmacs")))
    healed = [
        trial(r.trial, "tome", r.values["top1"] + 1.5, r.values["gmacs"]) for r in members[:4]
    ]
    # one that the others dominate is a mark all the same
    healed.append(trial(members[4].trial, "tome", 60.0, members[4].values["gmacs"]))
    figure = draw(results, recovered=healed)
    (line,) = marks(figure, "recovered front")
    x, y = line.get_xdata(), line.get_ydata()
    assert list(x) == [r.values["gmacs"] for r in healed[:4]]
    assert list(y) == [r.values["top1"] for r in healed[:4]]
    assert len(marks(figure, "recovered:")) == 5
    for before, after in zip(members[:5], healed, strict=True):
        (way,) = marks(figure, f"recovery:{after.trial}")
        assert list(way.get_ydata()) == [before.values["top1"], after.values["top1"]]
    assert "recovered front (4 trials)" in legend(figure)
    assert caption(figure).endswith("5 trials fine-tuned afterwards.")
    low, high = figure.axes[0].get_ylim()
    assert low < 60 and high > max(y), "nothing is cut off"
    assert_tidy(figure)
    assert not marks(draw(results), "recover")


def test_a_recipe_of_two_parts_is_a_control_where_both_are():
    results = [trial(0, "dense", 80.0, 4.6)]
    for number, (below, tokens) in enumerate(
        [("resize", "random"), ("resize", "topk"), ("nvit", "random"), ("nvit", "topk")], 1
    ):
        one = trial(number, tokens, 80.0 - number, 4.6 - 0.5 * number)
        results.append(replace(one, recipe=replace(one.recipe, structure=RecordedStep(below, {}))))
    shown = legend(draw(results))
    methods, controls = shown.index("Methods"), shown.index("Controls (baselines)")
    assert set(shown[methods + 1 : controls]) == {"resize+topk", "nvit+random", "nvit+topk"}
    assert shown[controls + 1 :] == ["resize+random"]


def test_the_caller_decides_which_methods_are_controls():
    figure = draw(study(60), is_control=lambda method: method == "tome")
    assert legend(figure)[-2:] == ["Controls (baselines)", "tome"]
    (tome,) = marks(figure, "finished:tome")
    assert len(tome.get_facecolor()) == 0


def test_no_controls_no_control_front():
    figure = draw(study(40, ("tome",)))
    assert not marks(figure, "control front") and "front of the controls" not in legend(figure)
    assert [t for t in legend(figure) if t in ("Methods", "tome")] == ["Methods", "tome"]
    assert_tidy(figure)


def test_trials_stopped_early_are_smaller_and_fainter():
    figure = draw(study(60))
    (full,), (early,) = marks(figure, "finished:tome"), marks(figure, "raced_out:tome")
    assert early.get_sizes()[0] < full.get_sizes()[0] and early.get_alpha() < full.get_alpha()


def test_methods_differ_in_colour_and_shape():
    figure = draw(study(1000, TWELVE + tuple(sorted(CONTROLS)), ruined=0.1))
    seen = {
        (tuple(np.round(a.get_facecolor()[0][:3], 3)), a.get_paths()[0].vertices.tobytes())
        for a in marks(figure, "finished:")
        if a.get_gid().split(":")[-1] in TWELVE and "below" not in a.get_gid()
    }
    assert len(seen) == 12
    assert_tidy(figure)


def test_ruined_trials_are_arrows_on_the_lower_edge_and_counted():
    results = study(200, ruined=0.1)
    figure = draw(results)
    sunk = [r.values["top1"] for r in results if r.values and r.values["top1"] < 49.85]
    assert sunk
    assert drawn(figure, "finished:below:") + drawn(figure, "raced_out:below:") == len(sunk)
    assert drawn(figure, "finished:") + drawn(figure, "raced_out:") == sum(
        bool(r.values) for r in results[1:]
    )
    low, _ = figure.axes[0].get_ylim()
    assert 48 < low < 49.85
    assert f"Arrows on the lower edge: {len(sunk)} trials below 49.85 %, down to" in caption(figure)
    assert_tidy(figure)


def test_if_most_trials_are_ruined_none_is_an_arrow():
    results = [trial(0, "dense", 80.0, 4.6), *(trial(i, "tome", 10.0 + i, i) for i in range(1, 4))]
    figure = draw(results)
    assert not marks(figure, "finished:below") and figure.axes[0].get_ylim()[0] < 11


def test_published_numbers_are_crosses_in_the_methods_colour():
    points = [
        PublishedPoint("tome", {"top1": 82.0, "gmacs": 2.7}),
        PublishedPoint("newcomer", {"top1": 76.0, "gmacs": 5.5}),
        PublishedPoint("nowhere", {"top1": 76.0}),
    ]
    figure = draw(study(60), published=points)
    crosses = {a.get_gid(): a for a in marks(figure, "published:")}
    assert set(crosses) == {"published:tome", "published:newcomer"}
    (tome,) = marks(figure, "finished:tome")
    assert same_color(to_rgba(crosses["published:tome"].get_color())[:3],
                      tuple(tome.get_facecolor()[0][:3]))  # fmt: skip
    assert figure.axes[0].get_xlim()[1] > 5.5 and figure.axes[0].get_ylim()[1] > 82
    assert {"reported in a paper\n(method's colour)", "newcomer"} <= set(legend(figure))
    assert_tidy(figure)


def test_axes_name_quantity_unit_and_direction():
    axes = draw(study(20)).axes[0]
    assert axes.get_xlabel() == "GMACs per image (G), lower is better"
    assert axes.get_ylabel() == "top-1 accuracy (%), higher is better"


def test_a_cost_where_more_is_better_and_trials_without_it():
    results = [
        trial(0, "dense", 80.0, 4.6, images_per_s=900.0),
        trial(1, "tome", 78.0, 3.0, images_per_s=1500.0),
        trial(2, "tome", 70.0, 2.0, images_per_s=2000.0),
        trial(3, "tome", 75.0, 2.5),
        trial(4, "tome", 75.0, 2.5, images_per_s=float("nan")),
    ]
    figure = draw(results, objectives=("top1", "images_per_s"))
    (line,) = marks(figure, "front")
    assert list(line.get_xdata()) == [2000.0, 1500.0, 900.0]  # cheapest first; steps follow members
    assert figure.axes[0].get_xlabel() == "throughput (1/s), higher is better"
    assert caption(figure) == "3 trials fully measured; not drawn: 2 without images_per_s."
    assert_tidy(figure)


# --------------------------------------------------------------------------------- the odd studies


def test_only_the_dense_model():
    figure = draw(study(1))
    assert not marks(figure, "front") and not drawn(figure, "finished:")
    assert legend(figure) == ["95 % interval", "dense model\n79.85 %, 4.608 G"]
    assert caption(figure) == (
        "1 trial fully measured. No front yet: no pruned model is fully measured."
    )
    assert_tidy(figure)


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([], "0 trials fully measured. No front yet."),
        (
            [trial(0, "tome", 0, 0, "failed")],
            "0 trials fully measured; not drawn: 1 failed. No front yet.",
        ),
        (
            [trial(0, "tome", 70.0, 2.0, "raced_out")],
            "0 trials fully measured; 1 stopped early. No front yet.",
        ),
        (
            [trial(0, "dense", 80.0, 4.6), trial(1, "tome", 79.0, 4.7)],
            "2 trials fully measured. "
            "No front: no trial costs less or is more accurate than the dense model.",
        ),
    ],
)
def test_no_front(results, expected):
    figure = draw(results)
    assert caption(figure) == expected
    assert not marks(figure, "front")
    assert_tidy(figure)


def test_identical_points_are_counted():
    figure = draw([trial(i, "tome", 80.0, 4.6) for i in range(5)])
    assert drawn(figure, "finished:tome") == 5
    assert "4 trials hidden by identical ones" in caption(figure)
    assert "Pareto front (1 trial)" in legend(figure)
    low, high = figure.axes[0].get_xlim()
    assert low < 4.6 < high
    assert_tidy(figure)


def test_titles_and_names_are_not_parsed_as_formulas():
    figure = front_figure(
        study(30, ("$a_b$", "_hidden", "a" * 80)), title=("$x$ is no formula " * 8).strip()
    )
    assert figure.get_suptitle().count("\n") >= 1
    assert {"$a_b$", "hidden", "a" * 25 + "…"} <= set(legend(figure))
    assert_tidy(figure)


def test_an_estimate_outside_its_interval_still_draws():
    odd = TrialResult(
        1, "finished", recipe_of("tome"), "k", {"top1": 75.0, "gmacs": 2.0},
        top1_low=75.5, top1_high=76.0,
    )  # fmt: skip
    assert marks(draw([odd]), "member:1")


# -------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["front.png", "front.PNG"])
def test_a_png_is_1800_pixels_wide(tmp_path: Path, name: str):
    path = plot_front(study(60), title=TITLE, path=tmp_path / name)
    assert path == tmp_path / name and path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path, format="png")
    assert pixels.shape[1] == 1800 and 900 < pixels.shape[0] < 1800
    assert pixels[..., :3].std() > 0.05  # something is drawn


@pytest.mark.parametrize("name", ["front.png", "front.svg"])
def test_the_same_results_are_the_same_file(tmp_path: Path, name: str):
    drawn = [plot_front(study(60), title=TITLE, path=tmp_path / f"{i}-{name}") for i in range(2)]
    assert drawn[0].read_bytes() == drawn[1].read_bytes()


def test_an_svg_parses_and_names_its_parts(tmp_path: Path):
    path = plot_front(study(60), title=TITLE, path=tmp_path / "front.svg")
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    ids = {element.get("id") for element in root.iter()}
    assert {"front", "dense", "finished:tome"} <= ids
    assert "<dc:date>" not in path.read_text(encoding="utf-8")


def test_a_thousand_trials_of_twelve_methods(tmp_path: Path):
    results = study(1000, TWELVE + tuple(sorted(CONTROLS)), ruined=0.05)
    for name in ("front.png", "front.svg"):
        assert plot_front(results, title=TITLE, path=tmp_path / name).stat().st_size > 20_000


@pytest.mark.parametrize("name", ["front.pdf", "front", "front.png.txt"])
def test_other_files_are_refused(tmp_path: Path, name: str):
    with refused(Code.OUT_OF_RANGE, UserError, got=Path(name).suffix):
        plot_front(study(3), title=TITLE, path=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_objective_is_refused():
    with refused(Code.UNKNOWN_NAME, UserError, name="gmac"):
        draw(study(3), objectives=("top1", "gmac"))


@pytest.mark.parametrize("objectives", [("top1",), ("top1", "gmacs", "params_m"), ()])
def test_a_picture_needs_two_objectives(objectives):
    with refused(Code.OUT_OF_RANGE, UserError, objectives=objectives):
        draw(study(3), objectives=objectives)


def test_no_global_matplotlib_state():
    """pyplot would keep every figure alive and choose a backend for the whole process."""
    code = (
        "import sys, vitpareto.dashboards.front_plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
