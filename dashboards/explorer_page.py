"""The Pareto explorer: one study, or several, as one HTML file that needs nothing else.

It works offline and inside MLflow's sandboxed frame: plotly.js, data and pictures are in the file,
nothing is fetched, nothing is kept. What the page does is in `explorer/`; here its data is put
together, from what `search` measured and judged.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from vitpareto import methods
from vitpareto.dashboards.method_styles import COLOURS, CONTROL_FRONT, DENSE, styles_of
from vitpareto.dashboards.token_picture import patches_png
from vitpareto.methods import BadInput, Recipe
from vitpareto.search.compare import published
from vitpareto.search.compare.show import TraceRequest, trace_images
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.study.certificates import flipped, measured
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES, objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.verdict import only_controls, recipe_line, verdict

#: the accuracy on held-out images, beside the objectives' names
HELD_OUT = "certified_top1"
_NAMES = {o.name: o.label for o in OBJECTIVES.values()} | {
    "top1": "top-1 on the search images",
    HELD_OUT: "top-1 on held-out images",
}
_COSTS = ("gmacs", "latency_ms", "params_m", "peak_mb")
#: images of a token picture, and how many of a front have one
SHOWN, MOST = 3, 24
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

log = logging.getLogger("vitpareto")


def token_pictures(folder: StudyFolder, cache: Path) -> dict[int, Path]:
    """What the front's recipes do to the first images of the search split: a PNG a trial, in the
    study's folder, drawn once. Of a large front some, evenly. A trial whose model or images are not
    at hand any more has none, which is said once.
    """
    front = front_of(folder.measured(), objectives_named(folder.objectives))
    members = [r for r in front if not r.is_reference]
    if len(members) > MOST:
        members = [members[round(i * (len(members) - 1) / (MOST - 1))] for i in range(MOST)]
    drawn: dict[int, Path] = {}
    for member in members:
        path = folder.picture(member.trial)
        if not path.exists():
            try:
                seen = trace_images(
                    TraceRequest.of_trial(folder, member.trial), images=SHOWN, cache=cache
                )
            except (UserError, BadInput) as error:
                log.warning("no picture of what trials keep: %s", error)
                return drawn
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, patches_png(seen))
        drawn[member.trial] = path
    return drawn


def explorer(
    folders: Sequence[StudyFolder], pictures: Mapping[str, Mapping[int, Path]] | None = None
) -> str:
    """The page of these studies, the first one's verdict above it.

    pictures: by study, token pictures (PNG files) by trial. ValueError without a study that has
    measured anything.
    """
    studies = [
        _study(folder, (pictures or {}).get(folder.name, {}), at)
        for at, folder in enumerate(folders)
    ]
    trials = [t for study in studies for t in study["trials"]]
    if not trials:
        raise ValueError("no study has a measured trial")
    known = {name for t in trials for name in t["values"]}
    held = any(t["held"] for t in trials)
    looks = styles_of(
        {t["method"] for t in trials} | {p["method"] for s in studies for p in s["published"]}
    )
    axes = folders[0].objectives
    first = next((o for o in axes if o not in ACCURACIES), "gmacs")
    costs = sorted((c for c in _COSTS if c in known), key=lambda c: c != first)
    data = {
        "studies": studies,
        "axes": {"x": costs, "y": ["top1", *([HELD_OUT] if held else ()),
                                   *(["top5"] if "top5" in known else ())]},
        "names": _NAMES,
        "units": {o.name: o.unit for o in OBJECTIVES.values()} | {HELD_OUT: "%"},
        "styles": {
            m: {"colour": look.colour, "shape": look.shape, "control": look.control}
            for m, look in looks.items()
        },
        "dashes": _DASHES,
        "control_front": CONTROL_FRONT,
        "dense": DENSE,
    }  # fmt: skip
    place = files("vitpareto.dashboards") / "explorer"
    said = studies[0]["verdict"] if len(studies) == 1 else _comparable(folders)
    about = [f"{s['name']}: {s['model']} on {s['data']}, {s['counts']}" for s in studies]
    return Template(place.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(" and ".join(s["name"] for s in studies)),
        css=place.joinpath("explorer.css").read_text(encoding="utf-8"),
        script=place.joinpath("explorer.js").read_text(encoding="utf-8"),
        verdict=html.escape(said),
        about=html.escape("; ".join(about)),
        plotly=get_plotlyjs(),
        # as JSON in a script element: nothing in it may end that element
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def write_explorer(
    folders: Sequence[StudyFolder],
    path: Path,
    pictures: Mapping[str, Mapping[int, Path]] | None = None,
) -> Path:
    """`explorer` into `path`; whole, or not there."""
    write_atomic(path, explorer(folders, pictures))
    return path


def _comparable(folders: Sequence[StudyFolder]) -> str:
    """Whether numbers of these studies may be read side by side."""
    told = []
    for key, what in (
        ("model_fingerprint", "models"),
        ("data_fingerprint", "images"),
        ("dtype", "dtypes"),
    ):
        if len({json.dumps(f.identity().get(key), sort_keys=True) for f in folders}) > 1:
            told.append(what)
    names = ", ".join(f.name for f in folders)
    if told:
        return f"{names} are of different {' and '.join(told)}: compare shapes, not points"
    return f"{names}: the same model and images"


def _study(folder: StudyFolder, pictures: Mapping[int, Path], at: int) -> dict[str, Any]:
    results = [r for r in measured(folder) if r.state in ("finished", "raced_out")]
    axes = objectives_named(folder.objectives)
    dense = reference_of(results)
    front = front_of(results, axes)
    knee = knee_of(front, axes, dense)
    latencies, job = folder.latencies(), folder.job()
    said = verdict(results, folder.objectives)
    early = sum(r.state == "raced_out" for r in results)
    trials = []
    for r in results:
        timed = r.timed or latencies.get(r.trial)
        values = {k: v for k, v in r.values.items() if math.isfinite(v)}
        stopped = " of the search split, then stopped" if r.state == "raced_out" else ""
        more = [["images", f"{r.images}{stopped}"]]
        if timed is not None:
            values.setdefault("latency_ms", timed.p50_ms)
            interval = f"{timed.speedup_low:.2f}–{timed.speedup_high:.2f}"
            more.append(
                ["speed-up", f"{timed.speedup:.2f} ({interval}) over dense; {timed.target}"]
            )
        if (flips := flipped(r, dense)) is not None and not r.is_reference:
            more.append(["flipped", f"{flips[0]} right to wrong, {flips[1]} wrong to right "
                                    f"({flips[2]} images)"])  # fmt: skip
        own = r.certified
        if own is not None and own.worst is not None and own.worst.drop > 0:
            noise = "" if own.worst.beyond_noise else "; within noise"
            more.append(["worst class", f"{own.worst.name}, {-own.worst.drop:+.1f} points of "
                                        f"{own.worst.images} images{noise}"])  # fmt: skip
        trials.append(
            {
                "n": r.trial,
                "state": r.state,
                "method": r.method,
                "control": only_controls(r.recipe),
                "dense": r.is_reference,
                "recipe": recipe_line(r),
                "yaml": _yaml(r),
                "values": values,
                "low": r.top1_low,
                "high": r.top1_high,
                "held": None if own is None else {"top1": own.top1, "low": own.low,
                                                  "high": own.high},
                "images": r.images,
                "knee": r is knee,
                "more": more,
            }
        )  # fmt: skip
    return {
        "name": folder.name,
        "model": str(job.get("model")),
        "data": str(job.get("data")),
        "verdict": str(said or "No pruned model has been measured in full yet"),
        "counts": f"{len(results) - early} trials measured in full, {early} stopped early, "
                  f"{len(front)} on the front",
        "colour": COLOURS[at % len(COLOURS)],
        "trials": trials,
        "pictures": {
            str(trial): "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            for trial, path in pictures.items()
        },
        # papers' figures are of ImageNet-1k: beside 10 classes they would say nothing
        "published": _published(str(job.get("model")))
        if any(r.provenance.get("classes") == 1000 for r in results)
        else [],
        "export": f"vitpareto export {folder.name} --trial {{n}} --out bundle/",
    }  # fmt: skip


def _yaml(result: TrialResult) -> str:
    """The recipe that rebuilds the candidate, with what was calibrated."""
    try:
        return Recipe.from_dict(result.resolved or result.recipe).to_yaml()
    except BadInput:
        return json.dumps(result.resolved or result.recipe)


def _published(model: str) -> list[dict[str, Any]]:
    """What papers report of this very model, at the cost that we count for the setting."""
    rows = [r for r in published.rows() if r.model == model.split(".")[0] and r.top1 is not None]
    rows = [r for r in rows if not r.model_options and r.recipe is not None]
    if not rows:
        return []
    shape = methods.model_shape(published.source_model(rows[0]).eval())
    out = []
    for row in rows:
        recipe = row.recipe
        assert recipe is not None and row.top1 is not None
        try:
            low, high = recipe_macs(recipe.checked(shape), shape)
        except BadInput:
            continue
        if low != high:  # images decide the cost
            continue
        theirs = "" if row.gflops is None else f", {row.gflops:g} GFLOPs as counted there"
        kind = "trained for it" if row.trained else "not trained"
        out.append(
            {
                "method": row.method,
                "label": row.label,
                "trained": row.trained,
                "said": f"{row.source}: {row.top1:g} %{theirs}; {kind}; ImageNet-1k",
                "values": {"gmacs": high / 1e9, "top1": row.top1},
            }
        )
    return out
