"""The Pareto explorer: one or several studies as one HTML file without external resources.

plotly.js, data and pictures are in the file, so it works offline and in MLflow's sandboxed frame.
The page's behaviour is in `explorer/`, its data in `explorer_data.py`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from vitpareto.dashboards.explorer_data import ExplorerStudy, explorer_study
from vitpareto.dashboards.method_styles import CONTROL_FRONT, DENSE, styles_of
from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.objectives import ACCURACIES, OBJECTIVES

#: the accuracy on held-out images, in addition to the objectives' names
CERTIFIED = "certified_top1"
_NAMES = {o.name: o.label for o in OBJECTIVES.values()} | {
    "top1": "top-1 on the search images",
    CERTIFIED: "top-1 on held-out images",
}
_UNITS = {o.name: o.unit for o in OBJECTIVES.values()} | {CERTIFIED: "%"}
_COSTS = ("gmacs", "latency_ms", "params_m", "peak_mb")
#: plotly's names of line styles, one per study
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def write_explorer(
    folders: Sequence[StudyFolder],
    path: Path,
    pictures: Mapping[str, Mapping[int, Path]] | None = None,
) -> Path:
    """Write `explorer` to a file atomically, and return its path."""
    write_atomic(path, explorer(folders, pictures))
    return path


def explorer(
    folders: Sequence[StudyFolder], pictures: Mapping[str, Mapping[int, Path]] | None = None
) -> str:
    """The HTML of these studies, under the verdict of a single study.

    Args:
        folders: the studies.
        pictures: token pictures (PNG files), by study and trial.

    Raises:
        UserError: no study has a measured trial.
    """
    studies = [
        explorer_study(folder, (pictures or {}).get(folder.name, {}), position)
        for position, folder in enumerate(folders)
    ]
    if not any(study.trials for study in studies):
        raise UserError(
            "the explorer needs a study with a measured trial "
            f"(got {', '.join(f.name for f in folders) or 'no study'})",
            Code.EMPTY,
            studies=tuple(f.name for f in folders),
        )
    data = _page_data(studies, folders[0].objectives)
    assets = files("vitpareto.dashboards") / "explorer"
    heading = studies[0].verdict if len(studies) == 1 else _comparability(folders)
    about = [f"{s.name}: {s.model} on {s.data}, {s.counts}" for s in studies]
    return Template(assets.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(" and ".join(s.name for s in studies)),
        css=assets.joinpath("explorer.css").read_text(encoding="utf-8"),
        script=assets.joinpath("explorer.js").read_text(encoding="utf-8"),
        verdict=html.escape(heading),
        about=html.escape("; ".join(about)),
        plotly=get_plotlyjs(),
        # JSON in a script element: no text in it may end the element
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )


def _page_data(studies: Sequence[ExplorerStudy], objectives: Sequence[str]) -> dict[str, Any]:
    """The JSON that `explorer.js` reads: studies, axes to choose from, and styles."""
    trials = [trial for study in studies for trial in study.trials]
    measured = {name for trial in trials for name in trial.values}
    accuracies = ["top1"]
    accuracies += [CERTIFIED] if any(trial.certified for trial in trials) else []
    accuracies += ["top5"] if "top5" in measured else []
    first = next((o for o in objectives if o not in ACCURACIES), "gmacs")
    costs = sorted((c for c in _COSTS if c in measured), key=lambda cost: cost != first)
    names = {trial.method for trial in trials}
    names |= {result.method for study in studies for result in study.published}
    return {
        "studies": [study.to_json() for study in studies],
        "axes": {"x": costs, "y": accuracies},
        "names": _NAMES,
        "units": _UNITS,
        "styles": {
            name: {"colour": style.colour, "shape": style.shape, "control": style.control}
            for name, style in styles_of(names).items()
        },
        "dashes": _DASHES,
        "control_front": CONTROL_FRONT,
        "dense": DENSE,
    }


def _comparability(folders: Sequence[StudyFolder]) -> str:
    """A sentence on whether the studies' numbers can be compared."""
    different = [
        what
        for key, what in (
            ("model_fingerprint", "models"),
            ("data_fingerprint", "images"),
            ("dtype", "dtypes"),
        )
        if len({json.dumps(f.identity.read().get(key), sort_keys=True) for f in folders}) > 1
    ]
    names = ", ".join(f.name for f in folders)
    if different:
        return (
            f"{names} have different {' and '.join(different)}: their values cannot be compared "
            "directly"
        )
    return f"{names} have the same model and images"
