"""Racing: whether a trial is confidently dominated by a fully measured one that costs no more.

Decisions on correctness and costs only. `search.trials.early_stopping` takes them from a study;
the bounds are in `search.stats.hypergeometric` and `search.stats.confidence_sequences`. All trials
see the M search images in the same shuffled order. A trial that has seen n of them is compared with
the most accurate incumbent whose costs are all at most its own. The null hypothesis is that the
trial is right on more of all M images; a trial whose hypothesis is rejected is stopped.

The error is the probability per study that a trial is stopped although it is better than the
incumbent, so that the front could lose it. All looks of a trial share its error equally. Trials
share the error of the study by Holm's procedure (Scand. J. Stat. 6, 1979): a dominated trial cannot
be lost any more, and its share goes to the others. Until the first wrong stop, only dominated
trials have released their share, so the sum over the trials that could be lost never exceeds the
error. Until then, the best incumbent of no higher cost is also the best of all trials so far, so
which incumbent a trial is compared with does not depend on the order of the images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitpareto.search.errors import BadInput, Code
from vitpareto.search.stats.confidence_sequences import Estimate, control_variate, log_capital
from vitpareto.search.stats.hypergeometric import Bits, PairedCounts

#: Images of the first look: at least this number and this fraction; growth from look to look.
FIRST, FIRST_SHARE, GROWTH = 32, 1 / 64, 1.3
#: Fraction of the error budget reserved for planned trials; the rest is for additional trials.
PLANNED_SHARE = 0.9
#: Number of planned trials if the study has no limit.
DEFAULT_PLANNED = 100
#: Fraction of a trial's error for comparisons of accuracy; the rest is for an uncertain cost.
ACCURACY_SHARE = 0.8


def rungs(
    images: int, first: int = FIRST, share: float = FIRST_SHARE, growth: float = GROWTH
) -> tuple[int, ...]:
    """Return the numbers of images after which a trial is checked, up to `images`."""
    out, at = [], float(max(first, math.ceil(share * images)))
    while at < images / math.sqrt(growth):  # a look just before the end saves nothing
        out.append(round(at))
        at *= growth
    return (*out, images)


@dataclass(frozen=True)
class Rule:
    """How a trial is compared.

    Attributes:
        estimator: the known correctness that the trial's is paired with: "plain" (none), "paired"
            (the incumbent's) or "control" (the dense model's, a control variate).
        bound: "split" (exact test, the error split over the looks) or "sequence" (a confidence
            sequence, valid at every look).
    """

    estimator: str
    bound: str

    @property
    def name(self) -> str:
        """Return the key in `RULES`."""
        return f"{self.estimator}-{self.bound}"


RULES = {
    rule.name: rule
    for rule in (
        Rule(estimator, bound)
        for bound in ("split", "sequence")
        for estimator in ("plain", "paired", "control")
    )
}
DEFAULT = RULES["control-split"]


@dataclass(frozen=True, eq=False)
class Incumbent:
    """A fully measured trial: its correctness [M] and its costs, of which lower is better."""

    trial: int
    right: Bits
    costs: tuple[float, ...]

    @functools.cached_property
    def count(self) -> int:
        """Number of images that it has right."""
        return int(self.right.sum())

    def covers(self, other: Incumbent) -> bool:
        """Return whether it is at least as good in accuracy and in every cost."""
        cheaper = all(a <= b for a, b in zip(self.costs, other.costs, strict=True))
        return cheaper and self.count >= other.count


@dataclass(frozen=True)
class Dominated:
    """A trial that is confidently no better than an incumbent of no higher cost.

    Attributes:
        by: the incumbent's trial number.
        images: number of images that the trial has seen.
        estimate: its accuracy on all images.
    """

    by: int
    images: int
    estimate: Estimate


def is_no_better(
    rule: Rule, right: Bits, other: Bits, dense: Bits, error: float, looks: int
) -> bool:
    """Test the hypothesis that a trial is right on more of all images than `other`.

    Args:
        rule: how to compare.
        right: [n], correctness of the trial.
        other, dense: [M], correctness of the incumbent and of the dense model.
        error: probability of a wrong rejection at any of the looks.
        looks: number of looks that share the error.

    Returns:
        Whether the hypothesis is rejected.
    """
    wanted = int(other.sum()) + 1
    reference = {"plain": np.ones_like(other), "paired": other, "control": dense}[rule.estimator]
    if rule.bound == "split":
        return PairedCounts.of(right, reference).rejects(wanted, error / max(1, looks))
    return log_capital(right, reference, wanted) >= -math.log(error)


@dataclass
class Race:
    """The decisions of one study.

    A trial that is restarted because its worker died sees the same images in the same order, so its
    looks have the same error again.

    Attributes:
        images: number of search images, M.
        error: probability per study of losing a front member; see the module.
        trials: number of planned trials; None without a limit.
        rule: how trials are compared.
        looks: number of looks before a trial's last image; 0 uses that of `rungs`.
    """

    images: int
    error: float
    trials: int | None
    rule: Rule = DEFAULT
    looks: int = 0
    #: order in which trials first appeared, from 0
    _order: dict[int, int] = field(default_factory=dict)
    #: dominated trials, by block
    _dominated: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise BadInput(
                f"error must be between 0 and 1 (got {self.error})",
                Code.OUT_OF_RANGE, name="error", got=self.error,
            )  # fmt: skip
        if not self.looks:
            self.looks = max(1, len(rungs(self.images)) - 1)

    def _block(self, trial: int) -> tuple[int, int]:
        """Return the trial's block and the size of the block.

        Block 0 has the planned trials; each later block is as large as all before it.
        """
        order = self._order.setdefault(trial, len(self._order))
        planned = self.trials or DEFAULT_PLANNED
        block, size, end = 0, planned, planned
        while order >= end:
            block, size, end = block + 1, end, 2 * end
        return block, size

    def error_of(self, trial: int) -> float:
        """Return the trial's share of the error.

        The trials of a block that are not dominated share the error of the block equally.
        """
        block, size = self._block(trial)
        share = PLANNED_SHARE if block == 0 else (1 - PLANNED_SHARE) * 0.5**block
        return self.error * share / max(1, size - len(self._dominated.get(block, ())))

    def mark_dominated(self, trial: int) -> None:
        """Release the error of a trial that is known to be dominated or was stopped. Idempotent."""
        self._dominated.setdefault(self._block(trial)[0], set()).add(trial)

    def check(
        self,
        trial: int,
        right: Bits,
        costs: Sequence[float],
        incumbents: Sequence[Incumbent],
        dense: Bits,
    ) -> Dominated | None:
        """Return the decision to stop a trial; None if it goes on.

        Args:
            trial: its number.
            right: [n], its correctness so far.
            costs: its costs, of which lower is better.
            incumbents: fully measured trials.
            dense: [M], correctness of the dense model.
        """
        eligible = [
            i
            for i in incumbents
            if i.trial != trial and all(a <= b for a, b in zip(i.costs, costs, strict=True))
        ]
        if not eligible:
            return None
        best = max(eligible, key=lambda i: (i.count, -i.trial))
        error = ACCURACY_SHARE * self.error_of(trial)
        if not is_no_better(self.rule, right, best.right, dense, error, self.looks):
            return None
        return Dominated(best.trial, len(right), control_variate(right, dense))

    def cost_error(self, trial: int) -> float:
        """Return the trial's share of the error for a bound on an uncertain cost."""
        return (1 - ACCURACY_SHARE) * self.error_of(trial)
