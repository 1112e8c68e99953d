"""What a trial reports at a rung, and the words with which a result says why it has no measurement.

Data only. The worker writes these records, early stopping and the searcher read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe

#: reason of a result whose cost or latency lies outside the study's limits
OUTSIDE_BUDGETS = "outside the budgets"
#: start of the reason of a result copied from an earlier trial; the trial's number follows
SAME_CANDIDATE = "the same candidate as trial"


@dataclass(frozen=True)
class RungReport:
    """A trial's measurement on the first images, from which early stopping decides.

    Attributes:
        key, resolved: of the candidate, calibrated.
        values: its costs as far as they are known, and top1, the mean over the images seen.
        right: bool [n], per-image correctness.
        macs_each: float [n], per-image MACs where images decide the cost, else None.
        bounds: fewest and most MACs that an image can cost.
        provenance: how the candidate got its weights, and the device.
        seconds: since the trial started.
    """

    key: str
    resolved: RecordedRecipe
    values: dict[str, float]
    # Ray formats every report for its debug log, even if the log is off
    right: np.ndarray = field(repr=False)
    macs_each: np.ndarray | None = field(default=None, repr=False)
    bounds: tuple[float, float] = (0.0, 0.0)
    provenance: Provenance = Provenance()
    seconds: float = 0.0
