"""The data of the explorer page: what `search` measured, as records that become JSON.

`explorer/explorer.js` reads this JSON; page and data are always written together.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitpareto import methods
from vitpareto.dashboards.method_styles import COLOURS
from vitpareto.methods import BadInput
from vitpareto.search.compare import published
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.measure.latency import Latency
from vitpareto.search.study.certificates import flipped, measured
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.verdict import is_control, verdict

#: classes of the data that published accuracies are measured on
_PUBLISHED_CLASSES = 1000


@dataclass(frozen=True)
class CertifiedTop1:
    """Top-1 on held-out images with its simultaneous interval, in percent."""

    top1: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ExplorerTrial:
    """A trial. `values` by objective name, in the objectives' units.

    `low` and `high` are the 95 % interval of top-1 on the search images, `images` how many of them
    were evaluated, `details` further lines of label and text.
    """

    number: int
    state: str
    method: str
    control: bool
    dense: bool
    recipe: str
    yaml: str
    values: Mapping[str, float]
    low: float | None
    high: float | None
    certified: CertifiedTop1 | None
    images: int
    knee: bool
    details: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class PublishedResult:
    """A result of a paper for the study's model, at the cost that this project counts."""

    method: str
    label: str
    trained: bool
    text: str
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ExplorerStudy:
    """A study. `pictures` are data addresses by trial number; `export` is a command with `{n}`."""

    name: str
    model: str
    data: str
    verdict: str
    counts: str
    colour: str
    trials: Sequence[ExplorerTrial]
    pictures: Mapping[str, str]
    published: Sequence[PublishedResult]
    export: str

    def to_json(self) -> dict[str, Any]:
        """The study as plain values."""
        return asdict(self)


def explorer_study(
    folder: StudyFolder, pictures: Mapping[int, Path], position: int
) -> ExplorerStudy:
    """The data of one study.

    Args:
        folder: the study.
        pictures: token pictures (PNG files) by trial.
        position: index of the study on the page; decides its colour.
    """
    results = [r for r in measured(folder) if r.state in ("finished", "raced_out")]
    axes, job = objectives_named(folder.objectives), folder.job()
    dense, front = reference_of(results), front_of(results, axes)
    knee, latencies = knee_of(front, axes, dense), folder.latencies.read()
    stopped_early = sum(r.state == "raced_out" for r in results)
    model = job.model
    return ExplorerStudy(
        name=folder.name,
        model=model,
        data=job.data,
        verdict=str(verdict(results, folder.objectives) or "No pruned model is fully measured yet"),
        counts=f"{len(results) - stopped_early} trials fully measured, {stopped_early} stopped "
        f"early, {len(front)} on the front",
        colour=COLOURS[position % len(COLOURS)],
        trials=[
            _trial(r, dense, r.latency or latencies.get(r.trial), knee=r is knee) for r in results
        ],
        pictures={str(trial): _data_address(path) for trial, path in pictures.items()},
        published=published_results(model) if _is_published_data(results) else [],
        export=f"vitpareto export {folder.name} --trial {{n}} --out bundle/",
    )


def _trial(
    result: TrialResult, dense: TrialResult | None, latency: Latency | None, *, knee: bool
) -> ExplorerTrial:
    values = {k: v for k, v in result.values.items() if math.isfinite(v)}
    if latency is not None:
        values.setdefault("latency_ms", latency.p50_ms)
    certified = result.certified
    return ExplorerTrial(
        number=result.trial,
        state=result.state,
        method=result.method,
        control=is_control(result),
        dense=result.is_reference,
        recipe=str(result.recipe),
        yaml=_yaml(result),
        values=values,
        low=result.top1_low,
        high=result.top1_high,
        certified=None
        if certified is None
        else CertifiedTop1(certified.top1, certified.low, certified.high),
        images=result.images,
        knee=knee,
        details=_details(result, dense, latency),
    )


def _details(
    result: TrialResult, dense: TrialResult | None, latency: Latency | None
) -> list[tuple[str, str]]:
    """Lines of a pinned trial: images, speed-up, changed predictions and worst class."""
    stopped = " of the search split, then stopped" if result.state == "raced_out" else ""
    details = [("images", f"{result.images}{stopped}")]
    if latency is not None:
        interval = f"{latency.speedup_low:.2f}–{latency.speedup_high:.2f}"
        details.append(
            ("speed-up", f"{latency.speedup:.2f} ({interval}) over dense; {latency.target}")
        )
    if (flips := flipped(result, dense)) is not None and not result.is_reference:
        lost, gained, split = flips
        details.append(
            ("changed", f"{lost} right to wrong, {gained} wrong to right ({split} images)")
        )
    worst = result.certified.worst if result.certified is not None else None
    if worst is not None and worst.drop > 0:
        noise = "" if worst.beyond_noise else "; within noise"
        text = f"{worst.name}, {-worst.drop:+.1f} points of {worst.images} images{noise}"
        details.append(("worst class", text))
    return details


def _yaml(result: TrialResult) -> str:
    """The recipe that rebuilds the candidate, calibrated values included."""
    try:
        return result.rebuilt_from.to_recipe().to_yaml()
    except BadInput:  # written by a version with other methods
        return json.dumps(result.rebuilt_from.to_json())


def _data_address(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def _is_published_data(results: Sequence[TrialResult]) -> bool:
    """Whether the data have as many classes as those of published results."""
    return any(r.provenance.classes == _PUBLISHED_CLASSES for r in results)


def published_results(model: str) -> list[PublishedResult]:
    """Published accuracies of this model, at the MACs that this project counts for the setting.

    Settings whose cost depends on the images are left out.
    """
    rows = [
        row
        for row in published.rows()
        if row.model == model.split(".")[0]
        and row.top1 is not None
        and row.recipe is not None
        and not row.model_options
    ]
    if not rows:
        return []
    shape = methods.model_shape(published.source_model(rows[0]).eval())
    found = []
    for row in rows:
        assert row.recipe is not None and row.top1 is not None
        try:
            low, high = recipe_macs(row.recipe.checked(shape), shape)
        except BadInput:
            continue
        if low != high:
            continue
        gflops = "" if row.gflops is None else f", {row.gflops:g} GFLOPs as the source counts"
        kind = "trained for it" if row.trained else "not trained"
        found.append(
            PublishedResult(
                method=row.method,
                label=row.label,
                trained=row.trained,
                text=f"{row.source}: {row.top1:g} %{gflops}; {kind}; ImageNet-1k",
                values={"gmacs": high / 1e9, "top1": row.top1},
            )
        )
    return found
