"""The rows of the table of all trials: what `vitpareto trials` prints as JSON. Renders nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, TrialState


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial. The fields are the keys of its JSON, in this order.

    Accuracies are in percent, `gmacs` in GMACs per image, `params_m` in millions, `latency_ms` in
    ms per batch (p50), `peak_mb` in MB; None if not measured. For a trial that was stopped early,
    `top1` and `top5` are estimates. `reason` is why a trial failed or was stopped.
    """

    trial: int
    state: TrialState
    method: str
    recipe: RecordedRecipe
    top1: float | None
    top5: float | None
    gmacs: float | None
    params_m: float | None
    latency_ms: float | None
    peak_mb: float | None
    images: int
    seconds: float
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The row as plain values, keys in the order of the fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "recipe": self.recipe.to_json()}


def trial_rows(results: Sequence[TrialResult]) -> list[TrialRow]:
    """One row per trial, in the given order."""
    measured = ("top1", "top5", "gmacs", "params_m", "latency_ms", "peak_mb")
    return [
        TrialRow(
            trial=r.trial,
            state=r.state,
            method=r.method,
            recipe=r.recipe,
            images=r.images,
            seconds=round(r.seconds, 3),
            reason=r.reason,
            **{name: r.values.get(name) for name in measured},
        )
        for r in results
    ]
