"""What the held-out images say of a study: intervals, flips, worst classes, changes of order.

Reads what `search.trials.certification` measured; may measure nothing and needs no image. The
intervals of all certified trials hold at once (`search.stats.intervals`). Trials are certified in
rounds, one at the end of a search and one each time it was continued; what a round was given of the
error is never changed, as somebody may have gone on because of what it showed.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from vitpareto.search.stats.intervals import (
    clopper_pearson,
    errors_by_round,
    holm,
    mcnemar,
    paired_difference,
)
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import Certified, TrialResult, WorstClass, unpack_bits

#: chance that any interval misses: of the accuracies, and likewise of the differences from dense
ERROR = 0.05
#: changes of order that a note names one by one
NAMED = 4


@dataclass(frozen=True, eq=False)
class Record:
    """Which images were certified on: `fingerprint` of the decoded split, its class names and
    labels [M]; and which trials, by round.
    """

    fingerprint: str
    classes: tuple[str, ...]
    labels: np.ndarray
    rounds: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Record:
        labels = np.frombuffer(base64.b64decode(plain["labels"]), dtype="<u2").astype(np.int64)
        rounds = tuple(tuple(trials) for trials in plain["rounds"])
        return cls(plain["fingerprint"], tuple(plain["classes"]), labels, rounds)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        labels = base64.b64encode(self.labels.astype("<u2").tobytes()).decode("ascii")
        return {
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "labels": labels,
            "rounds": [list(trials) for trials in self.rounds],
        }

    def errors(self) -> dict[int, float]:
        """What each trial's interval has of the error."""
        each = errors_by_round([len(trials) for trials in self.rounds], ERROR)
        return {t: error for trials, error in zip(self.rounds, each, strict=True) for t in trials}


def measured(folder: StudyFolder, recovered: bool = False) -> list[TrialResult]:
    """A study's results (`StudyFolder.measured`), or its recovered ones, with certificates."""
    results = folder.recovery.results() if recovered else folder.measured()
    record = folder.certification(recovered).read()
    if record is None:
        return results
    # what recovered trials are compared with is the dense model as it came
    dense = next((r for r in folder.certification().results() if r.is_reference), None)
    return attach(results, Record.of(record), folder.certification(recovered).results(), dense)


def attach(
    results: Sequence[TrialResult],
    record: Record,
    certified: Sequence[TrialResult],
    dense: TrialResult | None,
) -> list[TrialResult]:
    """The results, with what they are on held-out images put into those that were measured there.

    certified: the same trials on those images; dense: the model they are compared with.
    """
    errors, there = record.errors(), {r.trial: r for r in certified}
    out = []
    for result in results:
        held = there.get(result.trial)
        if held is not None and held.key == result.key and result.trial in errors:
            own = _certificate(held, dense, errors[result.trial], record)
            result = replace(result, certified=own)
        out.append(result)
    return out


def _certificate(
    held: TrialResult, dense: TrialResult | None, error: float, record: Record
) -> Certified:
    right, images = unpack_bits(held.bits, held.images), held.images
    low, high = clopper_pearson(int(right.sum()), images, error)
    own = Certified(images, held.bits, 100 * float(right.mean()), low, high)
    if dense is None or dense.key == held.key or dense.images != images:
        return own
    base = unpack_bits(dense.bits, images)
    lost, gained = flips(right, base)
    change_low, change_high = paired_difference(gained, lost, images, error)
    return replace(
        own, change=100 * (gained - lost) / images, change_low=change_low, change_high=change_high,
        lost=lost, gained=gained, worst=worst_class(right, base, record.labels, record.classes),
    )  # fmt: skip


def flips(right: np.ndarray, dense: np.ndarray) -> tuple[int, int]:
    """Of the same images [M]: how many the dense model alone has right, and how many it has not."""
    return int((dense & ~right).sum()), int((right & ~dense).sum())


def flipped(result: TrialResult, dense: TrialResult | None) -> tuple[int, int, str] | None:
    """`flips` of a trial against the dense model, and the split they were counted on: held-out
    where it is certified, else search. None where that was not measured.
    """
    own = result.certified
    if own is not None and (own.change is not None or result.is_reference):
        return own.lost, own.gained, "held-out"
    if dense is None or not result.images or result.images != dense.images:
        return None
    right, base = (unpack_bits(r.bits, r.images) for r in (result, dense))
    return (*flips(right, base), "search")


def worst_class(
    right: np.ndarray, dense: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> WorstClass | None:
    """The class with the largest drop in points, of equal ones that with most images.

    The drop is an estimate, and the largest of many: it is beyond noise where an exact McNemar test
    on the class's images says so after Bonferroni's correction for all classes. None for no image.
    """
    if len(labels) == 0:
        return None
    images, lost, gained = (
        np.bincount(labels[chosen], minlength=len(classes))
        for chosen in (np.full(len(labels), True), dense & ~right, right & ~dense)
    )
    drops = 100 * (lost - gained) / np.maximum(images, 1)
    drops[images == 0] = -np.inf
    at = int(np.lexsort((-images, -drops))[0])
    chance = mcnemar(int(lost[at]), int(lost[at] + gained[at])) * np.count_nonzero(images)
    return WorstClass(classes[at], float(drops[at]), int(images[at]), bool(chance <= ERROR))


# ---------------------------------------------------------------------------------------- the order


@dataclass(frozen=True)
class OrderChange:
    """Two members of a front whose order in top-1 the held-out images contradict.

    `first` was above `second` by `search` points on the search images, and is below it by
    `held_out` points on the held-out ones. `beyond_noise`: those alone show that it is below, with
    95 % for all pairs of the front at once.
    """

    first: int
    second: int
    search: float
    held_out: float
    beyond_noise: bool


def order_changes(front: Sequence[TrialResult]) -> list[OrderChange]:
    """Those of all pairs of certified members, the largest first."""
    tested, chances = [], []
    certified = [r for r in front if r.certified is not None]
    for a, b in combinations(certified, 2):
        if a.values["top1"] == b.values["top1"]:
            continue  # the search put them in no order
        first, second = (a, b) if a.values["top1"] > b.values["top1"] else (b, a)
        lost, gained = flips(*(_bits(r) for r in (first, second)))
        tested.append((first, second))
        # one-sided: `first` is at least as accurate
        chances.append(mcnemar(lost, lost + gained))
    found = []
    for (first, second), beyond in zip(tested, holm(chances, ERROR), strict=True):
        gap = _certified(second).top1 - _certified(first).top1
        if gap > 0:
            was = first.values["top1"] - second.values["top1"]
            found.append(OrderChange(first.trial, second.trial, was, gap, bool(beyond)))
    return sorted(found, key=lambda c: (not c.beyond_noise, -c.held_out, c.first, c.second))


def order_note(front: Sequence[TrialResult]) -> str:
    """One line on the order of a front's members; "" where fewer than two are certified."""
    certified = sum(r.certified is not None for r in front)
    if certified < 2:
        return ""
    changes, pairs = order_changes(front), certified * (certified - 1) // 2
    if not changes:
        return f"order: as on the search images, in all {pairs} pairs of certified trials"
    named = [
        f"trial {c.second} above trial {c.first} by {c.held_out:.2f} points"
        f"{' (more than noise)' if c.beyond_noise else ''}"
        for c in changes
    ]
    more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
    shown = sum(c.beyond_noise for c in changes)
    return (
        f"order: held-out images turn {len(changes)} of {pairs} pairs round, {shown or 'none'} by "
        f"more than noise: {'; '.join(named[:NAMED])}{more}"
    )


def why_not(folder: StudyFolder, front: Sequence[TrialResult]) -> str:
    """Why members of the front are not certified, in one line; "" where all are."""
    missing = [r.trial for r in front if r.certified is None]
    if not missing:
        return ""
    again = f"vitpareto search --name {folder.name}"
    if folder.job().get("certify", "front") == "off":
        again = f"the job says certify: off; {again} --certify front"
    if len(missing) == len(front):
        return f"not certified on held-out images yet: {again} does it when it ends"
    shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
    return f"trials not certified on held-out images yet: {shown}: {again} does it when it ends"


def _certified(result: TrialResult) -> Certified:
    assert result.certified is not None
    return result.certified


def _bits(result: TrialResult) -> np.ndarray:
    own = _certified(result)
    return unpack_bits(own.bits, own.images)
