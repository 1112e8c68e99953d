"""Racing: when a trial is confidently behind one that was measured in full and costs no more.

Only decisions, on bits and costs; `search.trials.early_stopping` brings them from a study, and
`search.stats.hypergeometric` and `search.stats.confidence_sequences` have the bounds. All trials
see the M search images in one shuffled order; a trial that has seen n of them is compared with the
most accurate incumbent whose costs are all no higher. Null hypothesis: on all M images it is right
more often. Refuting that stops it.

The error is the chance, per study, that a trial is stopped which is better than the one it was
stopped for, so that the front could lose it. Each look has an equal part of its trial's error, and
trials share the study's after Holm (Scand. J. Stat. 6, 1979): what is behind already cannot be lost
any more, and leaves its part to the others. Until the first wrong stop only trials that really are
behind have left theirs, so that the sum over those that could be lost never exceeds the error;
until then, too, the best incumbent of no higher cost is the best of all trials that were tried,
whoever was stopped, so that whom a trial is compared with does not depend on the images' order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitpareto.search.errors import BadInput, Code
from vitpareto.search.stats.confidence_sequences import Estimate, control_variate, log_capital
from vitpareto.search.stats.hypergeometric import Bits, Seen

#: the first look's images, at least so many and at least so large a part, and how looks grow
FIRST, FIRST_SHARE, GROWTH = 32, 1 / 64, 1.3
#: what of the error goes to the trials that were planned; the rest to those of a longer study
PLANNED = 0.9
#: trials that share that where nobody said how many there will be
UNPLANNED = 100
#: what of a trial's error goes to its comparisons of accuracy, and not to an uncertain cost
ACCURACY_SHARE = 0.8


def rungs(
    images: int, first: int = FIRST, share: float = FIRST_SHARE, growth: float = GROWTH
) -> tuple[int, ...]:
    """Numbers of images after which a trial is looked at, rising to `images`, the last one."""
    out, at = [], float(max(first, math.ceil(share * images)))
    while at < images / math.sqrt(growth):  # a look just before the end saves nothing
        out.append(round(at))
        at *= growth
    return (*out, images)


@dataclass(frozen=True)
class Rule:
    """How a trial is compared.

    estimator: beside which known correctness the trial is seen: "plain" (none: its own accuracy),
    "paired" (the incumbent's, image by image) or "control" (the dense model's: a control variate).
    bound: "split" (exact tails, the error split over the looks) or "sequence" (bets, valid at every
    look).
    """

    estimator: str
    bound: str

    @property
    def name(self) -> str:
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
    """A fully measured trial: its correctness [M], and its costs, less being better."""

    trial: int
    right: Bits
    costs: tuple[float, ...]

    @functools.cached_property
    def count(self) -> int:
        """Images it has right."""
        return int(self.right.sum())

    def covers(self, other: Incumbent) -> bool:
        """No worse in accuracy and in every cost."""
        cheaper = all(a <= b for a, b in zip(self.costs, other.costs, strict=True))
        return cheaper and self.count >= other.count


@dataclass(frozen=True)
class Lost:
    """A trial that is confidently behind `by`, after so many images; what it comes to (percent)."""

    by: int
    images: int
    estimate: Estimate


def refuted(rule: Rule, right: Bits, other: Bits, dense: Bits, error: float, looks: int) -> bool:
    """Whether "right on more of all images than `other`" is refuted, at this error.

    right [n]: the trial's; other, dense [M]. error: of all looks together, `looks` of them.
    """
    wanted = int(other.sum()) + 1
    beside = {"plain": np.ones_like(other), "paired": other, "control": dense}[rule.estimator]
    if rule.bound == "split":
        return Seen.of(right, beside).refutes(wanted, error / max(1, looks))
    return log_capital(right, beside, wanted) >= -math.log(error)


@dataclass
class Race:
    """One study's decisions.

    images: M; error: see the module; trials: how many are planned (None: nobody knows); looks: how
    many a trial has before its last image (0: as many as `rungs` gives).

    A trial that is started again, because its worker died, sees the same images in the same order:
    its looks are the same looks, and have the same error.
    """

    images: int
    error: float
    trials: int | None
    rule: Rule = DEFAULT
    looks: int = 0
    #: trials by when they were first heard of, and of those how many are behind, by block
    _place: dict[int, int] = field(default_factory=dict)
    _behind: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise BadInput(
                f"error must be between 0 and 1 (got {self.error})",
                Code.OUT_OF_RANGE, name="error", got=self.error,
            )  # fmt: skip
        if not self.looks:
            self.looks = max(1, len(rungs(self.images)) - 1)

    def _block(self, trial: int) -> tuple[int, int]:
        """Which block of trials it is in, and how many that holds. The planned ones are the first;
        of later ones each is as large as all before it.
        """
        place = self._place.setdefault(trial, len(self._place))
        planned = self.trials or UNPLANNED
        block, size, end = 0, planned, planned
        while place >= end:
            block, size, end = block + 1, end, 2 * end
        return block, size

    def allowed(self, trial: int) -> float:
        """This trial's part of the error: of what its block has, shared with those of it that are
        not behind yet.
        """
        block, size = self._block(trial)
        has = PLANNED if block == 0 else (1 - PLANNED) * 0.5**block
        return self.error * has / max(1, size - len(self._behind.get(block, ())))

    def behind(self, trial: int) -> None:
        """The trial is known to be behind another, or was stopped for that: it is not raced any
        more, and leaves its part of the error to the others.
        """
        self._behind.setdefault(self._block(trial)[0], set()).add(trial)

    def look(
        self,
        trial: int,
        right: Bits,
        costs: Sequence[float],
        incumbents: Sequence[Incumbent],
        dense: Bits,
    ) -> Lost | None:
        """Whether the trial, right [n] so far at these costs, is confidently behind; None: not."""
        no_dearer = [
            i
            for i in incumbents
            if i.trial != trial and all(a <= b for a, b in zip(i.costs, costs, strict=True))
        ]
        if not no_dearer:
            return None
        best = max(no_dearer, key=lambda i: (i.count, -i.trial))
        error = ACCURACY_SHARE * self.allowed(trial)
        if not refuted(self.rule, right, best.right, dense, error, self.looks):
            return None
        return Lost(best.trial, len(right), control_variate(right, dense))

    def cost_error(self, trial: int) -> float:
        """The part of the trial's error that a bound on an uncertain cost may use."""
        return (1 - ACCURACY_SHARE) * self.allowed(trial)
