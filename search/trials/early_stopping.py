"""The driver's part of racing: who a climbing trial is compared with, and what a stopped one is.

The statistics are `search.stats.racing`'s; here are the study's results. A trial is stopped only
for a fully measured one that costs no more in any objective, so that the front stays what it would
have been, up to the error that the job allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitpareto.methods import Recipe
from vitpareto.search.stats.confidence_sequences import cost_floor
from vitpareto.search.stats.racing import Incumbent, Race
from vitpareto.search.study.objectives import Objective
from vitpareto.search.study.results import TrialResult, pack_bits, unpack_bits
from vitpareto.search.study.verdict import only_controls
from vitpareto.search.trials.trial import Rung


@dataclass
class EarlyStopping:
    """One study's race. `admit` what is measured in full, `hear` of every rung.

    A control is compared with controls alone: they have a front of their own, which says what
    pruning gains, and which no method may thin out.

    race: the rules; objectives: the study's; provenance: what goes into a stopped trial's result.
    """

    race: Race
    objectives: Sequence[Objective]
    provenance: dict[str, Any]
    dense: np.ndarray | None = None
    _fronts: dict[bool, list[Incumbent]] = field(default_factory=lambda: {True: [], False: []})

    def admit(self, result: TrialResult) -> None:
        """A result that is durable: a fully measured one is an incumbent from now on."""
        if result.state == "raced_out":
            self.race.behind(result.trial)
        if result.state != "finished":
            return
        right = unpack_bits(result.bits, result.images)
        if result.is_reference and self.dense is None:
            self.dense = right
        new = Incumbent(result.trial, right, self._costs(result.values))
        control = only_controls(result.recipe)
        for group in (True, False) if control else (False,):
            kept = self._fronts[group]
            if not any(old.covers(new) for old in kept):
                self._fronts[group] = [*(old for old in kept if not new.covers(old)), new]
            elif group == control:  # among those that it would have been raced against
                self.race.behind(result.trial)

    def hear(self, trial: int, recipe: Recipe, rung: Rung) -> TrialResult | None:
        """What the trial is if it stops here, because it is confidently behind; None: it climbs."""
        if self.dense is None or recipe == Recipe():
            return None
        values = dict(rung.values)
        if rung.macs_each is not None:
            # of an input-adaptive cost only what it will surely come to counts against others
            floor = cost_floor(
                rung.macs_each, rung.bounds, len(self.dense), self.race.cost_error(trial)
            )
            values["gmacs"] = floor / 1e9
        incumbents = self._fronts[only_controls(recipe.to_dict())]
        lost = self.race.look(trial, rung.right, self._costs(values), incumbents, self.dense)
        if lost is None:
            return None
        estimate = lost.estimate
        seen = len(rung.right)
        return TrialResult(
            trial, "raced_out", recipe.to_dict(), rung.key,
            {**rung.values, "top1": estimate.value}, rung.resolved, seen, pack_bits(rung.right),
            estimate.low, estimate.high, rung.seconds,
            f"behind trial {lost.by} after {seen} of {len(self.dense)} images",
            {**self.provenance, **rung.record},
        )  # fmt: skip

    def _costs(self, values: dict[str, float]) -> tuple[float, ...]:
        return tuple(o.sign * values[o.name] for o in self.objectives if o.name != "top1")
