"""Early stopping: whether a trial goes on to its next rung, by the study's results so far.

The statistics are in `search.stats.racing`. A trial is stopped only if a fully measured one is
confidently better and costs no more in any objective, so that the front stays what it would have
been, up to the error that the job allows. Does not import ray or optuna.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitpareto.methods import Recipe
from vitpareto.search.stats.confidence_sequences import cost_floor
from vitpareto.search.stats.racing import Incumbent, Race
from vitpareto.search.study.objectives import Objective
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits, unpack_bits
from vitpareto.search.study.rungs import RungReport
from vitpareto.search.study.verdict import is_control


@dataclass
class EarlyStopping:
    """One study's early stopping: call `on_result` with every result and `on_rung` at every rung.

    A control is compared with controls only: they have a front of their own, which shows what
    pruning gains, and methods must not thin it out.

    Attributes:
        race: the statistical rules.
        objectives: the study's.
        provenance: of a stopped trial's result.
        dense: bool [images], correctness of the dense model; None until it is measured.
    """

    race: Race
    objectives: Sequence[Objective]
    provenance: Provenance
    dense: np.ndarray | None = None
    #: fully measured trials that no other one covers, for controls (True) and for all (False)
    _fronts: dict[bool, list[Incumbent]] = field(default_factory=lambda: {True: [], False: []})

    def on_result(self, result: TrialResult) -> None:
        """Take in a durable result: a fully measured one becomes an incumbent."""
        if result.state == "raced_out":
            self.race.mark_dominated(result.trial)
        if result.state != "finished":
            return
        right = unpack_bits(result.bits, result.images)
        if result.is_reference and self.dense is None:
            self.dense = right
        new = Incumbent(result.trial, right, self._costs(result.values))
        control = is_control(result)
        for group in (True, False) if control else (False,):
            front = self._fronts[group]
            if not any(old.covers(new) for old in front):
                self._fronts[group] = [*(old for old in front if not new.covers(old)), new]
            elif group == control:  # among those that it would have been compared with
                self.race.mark_dominated(result.trial)

    def on_rung(self, trial: int, recipe: Recipe, report: RungReport) -> TrialResult | None:
        """The trial's result if it stops at this rung, or None if it goes on."""
        if self.dense is None or recipe == Recipe():
            return None
        values = dict(report.values)
        if report.macs_each is not None:
            # of a cost that images decide, only its lower bound counts against others
            error = self.race.cost_error(trial)
            floor = cost_floor(report.macs_each, report.bounds, len(self.dense), error)
            values["gmacs"] = floor / 1e9
        recorded = RecordedRecipe.of(recipe)
        incumbents = self._fronts[recorded.only_controls]
        costs = self._costs(values)
        decision = self.race.check(trial, report.right, costs, incumbents, self.dense)
        if decision is None:
            return None
        estimate, seen = decision.estimate, len(report.right)
        return TrialResult(
            trial=trial,
            state="raced_out",
            recipe=recorded,
            key=report.key,
            values={**report.values, "top1": estimate.value},
            resolved=report.resolved,
            images=seen,
            bits=pack_bits(report.right),
            top1_low=estimate.low,
            top1_high=estimate.high,
            seconds=report.seconds,
            reason=f"behind trial {decision.by} after {seen} of {len(self.dense)} images",
            provenance=self.provenance.updated(report.provenance),
        )

    def _costs(self, values: dict[str, float]) -> tuple[float, ...]:
        """All objectives but top1, each with the sign that makes less better."""
        return tuple(o.sign * values[o.name] for o in self.objectives if o.name != "top1")
