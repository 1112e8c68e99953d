"""The rows of the front's table: what `vitpareto front` prints and what MLflow stores.

Computes rows from results and their certificates; measures and renders nothing.
`dashboards.tables` shows the rows on a terminal, `search.tracking` logs them to MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vitpareto.methods import Recipe
from vitpareto.search.measure.latency import Latency, LatencyTarget
from vitpareto.search.study.certificates import OrderChange, flipped, measured, order_changes
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of, knee_of, reference_of
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.results import TrialResult


@dataclass(frozen=True, kw_only=True)
class FrontRow:
    """One member of the front. The fields are the columns of CSV and JSON, in this order.

    Units: accuracies and their bounds in percent, changes and drops in percentage points, `gmacs`
    in GMACs per image, `params_m` in millions, `peak_mb` in MB, `latency_ms` in ms per batch (p50).
    A value is None if it was not measured.

    Attributes:
        trial: number of the trial.
        method: names of its methods, for example `resize+topk`.
        recipe: the recipe on one line.
        top1: top-1 on the search images, with its 95 % interval `top1_low`, `top1_high`.
        top1_change: difference of `top1` from the dense model.
        gmacs_share: `gmacs` divided by that of the dense model.
        speedup: dense latency divided by `latency_ms`, with its 95 % interval.
        latency_target: the target that the latency was measured on.
        images: search images seen.
        knee: whether this member is the knee of the front.
        recovered: whether the model was fine-tuned after the search.
        top1_before: for a recovered model, `top1` of the same trial before fine-tuning.
        certified_top1: top-1 on the held-out images. Its interval, and that of
            `certified_change`, hold for all certified trials of the study at once.
        certified_change: difference of `certified_top1` from the dense model.
        lost: images that the dense model classifies correctly and this one does not.
        gained: images that this one classifies correctly and the dense model does not.
        flips_of: split on which `lost` and `gained` are counted.
        worst_class: class with the largest drop in held-out accuracy against the dense model.
        contradicts: members whose order with this one is reversed on the held-out images.
        contradicts_beyond_noise: those of them where the reversal is statistically significant.
    """

    trial: int
    method: str
    recipe: str
    top1: float
    top1_low: float | None
    top1_high: float | None
    top1_change: float | None
    gmacs: float
    gmacs_share: float | None
    params_m: float
    peak_mb: float | None
    latency_ms: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    latency_target: LatencyTarget | None
    images: int
    knee: bool
    recovered: bool
    top1_before: float | None
    certified_top1: float | None
    certified_top1_low: float | None
    certified_top1_high: float | None
    certified_change: float | None
    certified_change_low: float | None
    certified_change_high: float | None
    certified_images: int | None
    lost: int | None
    gained: int | None
    flips_of: str | None
    worst_class: str | None
    worst_class_drop: float | None
    worst_class_images: int | None
    worst_class_beyond_noise: bool | None
    contradicts: tuple[int, ...]
    contradicts_beyond_noise: tuple[int, ...]

    @property
    def is_reference(self) -> bool:
        """Whether this is the dense model."""
        return self.method == Recipe().method

    def to_json(self) -> dict[str, Any]:
        """The row as plain values, keys in the order of the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.latency_target is not None:
            values["latency_target"] = self.latency_target.to_json()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def study_front_rows(folder: StudyFolder) -> list[FrontRow]:
    """The rows of a study's front, followed by those of the recovered front if there is one."""
    results, recovered = measured(folder), measured(folder, recovered=True)
    objectives, latencies = folder.objectives, folder.latencies.read()
    rows = front_rows(results, latencies, objectives)
    return rows + (front_rows(recovered, latencies, objectives, results) if recovered else [])


def front_rows(
    results: Sequence[TrialResult],
    latencies: Mapping[int, Latency],
    objectives: Sequence[str],
    before: Sequence[TrialResult] | None = None,
) -> list[FrontRow]:
    """The rows of the front of `results`, in order of increasing GMACs.

    Args:
        results: measured trials, with their certificates.
        latencies: latencies measured at the end of the search, by trial.
        objectives: names of the study's objectives.
        before: only for recovered trials: the results of the study before fine-tuning. The dense
            model among them is the reference.
    """
    axes = objectives_named(objectives)
    front, dense = front_of(results, axes), reference_of(results if before is None else before)
    top1_before = {r.trial: r.values.get("top1") for r in before or ()}
    knee, changes = knee_of(front, axes, dense), order_changes(front)
    return [
        _front_row(
            result,
            dense,
            result.latency or latencies.get(result.trial),
            changes,
            knee=result is knee,
            recovered=before is not None,
            top1_before=top1_before.get(result.trial),
        )
        for result in front
    ]


def _reversed_with(trial: int, changes: Sequence[OrderChange]) -> list[tuple[int, bool]]:
    """The trials whose order with this one changed, and whether it did beyond noise."""
    return [
        (c.second if c.first == trial else c.first, c.beyond_noise)
        for c in changes
        if trial in (c.first, c.second)
    ]


def _front_row(
    result: TrialResult,
    dense: TrialResult | None,
    latency: Latency | None,
    changes: Sequence[OrderChange],
    *,
    knee: bool,
    recovered: bool,
    top1_before: float | None,
) -> FrontRow:
    values, certified = result.values, result.certified
    worst = None if certified is None else certified.worst
    lost, gained, split = flipped(result, dense) or (None, None, None)
    reversed_with = _reversed_with(result.trial, changes)
    return FrontRow(
        trial=result.trial,
        method=result.method,
        recipe=str(result.recipe),
        top1=values["top1"],
        top1_low=result.top1_low,
        top1_high=result.top1_high,
        top1_change=None if dense is None else values["top1"] - dense.values["top1"],
        gmacs=values["gmacs"],
        gmacs_share=None if dense is None else values["gmacs"] / dense.values["gmacs"],
        params_m=values["params_m"],
        peak_mb=values.get("peak_mb"),
        latency_ms=values.get("latency_ms", latency.p50_ms if latency else None),
        speedup=latency.speedup if latency else None,
        speedup_low=latency.speedup_low if latency else None,
        speedup_high=latency.speedup_high if latency else None,
        latency_target=latency.target if latency else None,
        images=result.images,
        knee=knee,
        recovered=recovered,
        top1_before=top1_before,
        certified_top1=certified.top1 if certified else None,
        certified_top1_low=certified.low if certified else None,
        certified_top1_high=certified.high if certified else None,
        certified_change=certified.change if certified else None,
        certified_change_low=certified.change_low if certified else None,
        certified_change_high=certified.change_high if certified else None,
        certified_images=certified.images if certified else None,
        lost=lost,
        gained=gained,
        flips_of=split,
        worst_class=worst.name if worst else None,
        worst_class_drop=worst.drop if worst else None,
        worst_class_images=worst.images if worst else None,
        worst_class_beyond_noise=worst.beyond_noise if worst else None,
        contradicts=tuple(trial for trial, _ in reversed_with),
        contradicts_beyond_noise=tuple(trial for trial, beyond in reversed_with if beyond),
    )
