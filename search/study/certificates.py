"""Results on held-out images: intervals, flips, worst classes and changes of order.

Reads what `search.trials.certification` measured; it may not measure and needs no images. The
intervals of all certified trials hold at once (`search.stats.intervals`). Trials are certified in
rounds, one at the end of a search and one each time it is continued. The error of a round is never
changed later, because the search may have been continued because of its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from vitpareto.search.stats.intervals import (
    clopper_pearson,
    holm,
    mcnemar,
    paired_difference,
)
from vitpareto.search.study.certification_record import ERROR, CertificationRecord
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import Certified, TrialResult, WorstClass, unpack_bits

#: Number of changes of order that a note lists.
NAMED = 4


def measured(folder: StudyFolder, recovered: bool = False) -> list[TrialResult]:
    """Return the study's results, or its recovered ones, with certificates."""
    results = folder.recovery.results() if recovered else folder.measured()
    record = folder.certification(recovered).read()
    if record is None:
        return results
    # recovered trials are compared with the dense model before recovery
    dense = next((r for r in folder.certification().results() if r.is_reference), None)
    return attach(results, record, folder.certification(recovered).results(), dense)


def attach(
    results: Sequence[TrialResult],
    record: CertificationRecord,
    certified: Sequence[TrialResult],
    dense: TrialResult | None,
) -> list[TrialResult]:
    """Return the results, with certificates for those that were measured on held-out images.

    Args:
        results: on search images.
        record: of the certification.
        certified: the same trials on held-out images.
        dense: the model they are compared with, on held-out images.
    """
    errors, held_out = record.errors(), {r.trial: r for r in certified}
    attached = []
    for result in results:
        found = held_out.get(result.trial)
        if found is not None and found.key == result.key and result.trial in errors:
            certificate = _certificate(found, dense, errors[result.trial], record)
            result = replace(result, certified=certificate)
        attached.append(result)
    return attached


def _certificate(
    result: TrialResult, dense: TrialResult | None, error: float, record: CertificationRecord
) -> Certified:
    """Return the certificate of a trial; both results are on held-out images."""
    right, images = unpack_bits(result.bits, result.images), result.images
    low, high = clopper_pearson(int(right.sum()), images, error)
    certificate = Certified(images, result.bits, 100 * float(right.mean()), low, high)
    if dense is None or dense.key == result.key or dense.images != images:
        return certificate
    dense_right = unpack_bits(dense.bits, images)
    lost, gained = flips(right, dense_right)
    change_low, change_high = paired_difference(gained, lost, images, error)
    return replace(
        certificate,
        change=100 * (gained - lost) / images,
        change_low=change_low,
        change_high=change_high,
        lost=lost,
        gained=gained,
        worst=worst_class(right, dense_right, record.labels, record.classes),
    )


def flips(right: np.ndarray, dense: np.ndarray) -> tuple[int, int]:
    """Return how many of the images [M] only the dense model, and only the other, has right."""
    return int((dense & ~right).sum()), int((right & ~dense).sum())


def flipped(result: TrialResult, dense: TrialResult | None) -> tuple[int, int, str] | None:
    """Return (lost, gained, split) of a trial against the dense model.

    The split is "held-out" if the trial is certified, else "search"; None if neither was measured.
    """
    certificate = result.certified
    if certificate is not None and (certificate.change is not None or result.is_reference):
        return certificate.lost, certificate.gained, "held-out"
    if dense is None or not result.images or result.images != dense.images:
        return None
    right, dense_right = (unpack_bits(r.bits, r.images) for r in (result, dense))
    return (*flips(right, dense_right), "search")


def worst_class(
    right: np.ndarray, dense: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> WorstClass | None:
    """Return the class with the largest drop in points; of equal ones that with most images.

    The drop is the largest of many estimates: it is beyond noise if an exact McNemar test on the
    class's images is significant after Bonferroni's correction for all classes. None if empty.
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
    p_value = mcnemar(int(lost[at]), int(lost[at] + gained[at])) * np.count_nonzero(images)
    return WorstClass(classes[at], float(drops[at]), int(images[at]), bool(p_value <= ERROR))


# -- order -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OrderChange:
    """Two members of a front whose order by top-1 is reversed on held-out images.

    `first` is above `second` by `search` points on the search images, and below it by `held_out`
    points on the held-out ones. `beyond_noise`: the held-out images alone show that it is below,
    with 95 % for all pairs of the front at once.
    """

    first: int
    second: int
    search: float
    held_out: float
    beyond_noise: bool


def order_changes(front: Sequence[TrialResult]) -> list[OrderChange]:
    """Return the changes among all pairs of certified members, the largest first."""
    pairs, p_values = [], []
    certified = [r for r in front if r.certified is not None]
    for a, b in combinations(certified, 2):
        if a.values["top1"] == b.values["top1"]:
            continue  # the search did not order them
        first, second = (a, b) if a.values["top1"] > b.values["top1"] else (b, a)
        lost, gained = flips(*(_bits(r) for r in (first, second)))
        pairs.append((first, second))
        # the one-sided null hypothesis is that `first` is at least as accurate
        p_values.append(mcnemar(lost, lost + gained))
    found = []
    for (first, second), beyond in zip(pairs, holm(p_values, ERROR), strict=True):
        gap = _certified(second).top1 - _certified(first).top1
        if gap > 0:
            before = first.values["top1"] - second.values["top1"]
            found.append(OrderChange(first.trial, second.trial, before, gap, bool(beyond)))
    return sorted(found, key=lambda c: (not c.beyond_noise, -c.held_out, c.first, c.second))


def order_note(front: Sequence[TrialResult]) -> str:
    """Return a line on the order of the members; "" if fewer than two are certified."""
    certified = sum(r.certified is not None for r in front)
    if certified < 2:
        return ""
    changes, pairs = order_changes(front), certified * (certified - 1) // 2
    if not changes:
        return f"order: the same as on the search images for all {pairs} pairs of certified trials"
    listed = [
        f"trial {c.second} above trial {c.first} by {c.held_out:.2f} points"
        f"{' (significant)' if c.beyond_noise else ''}"
        for c in changes
    ]
    more = f"; and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    significant = sum(c.beyond_noise for c in changes)
    return (
        f"order: {len(changes)} of {pairs} pairs are reversed on held-out images, "
        f"{significant or 'none'} significantly: {'; '.join(listed[:NAMED])}{more}"
    )


def why_not(folder: StudyFolder, front: Sequence[TrialResult]) -> str:
    """Return why members of the front are not certified, in one line; "" if all are."""
    missing = [r.trial for r in front if r.certified is None]
    if not missing:
        return ""
    fix = f"run vitpareto search --name {folder.name}"
    if not folder.job().certifies:
        fix = f"the job has certify: off; {fix} --certify front"
    if len(missing) == len(front):
        return f"the front is not certified on held-out images yet; {fix}"
    listed = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
    return f"trials not certified on held-out images yet: {listed}; {fix}"


def _certified(result: TrialResult) -> Certified:
    assert result.certified is not None
    return result.certified


def _bits(result: TrialResult) -> np.ndarray:
    certificate = _certified(result)
    return unpack_bits(certificate.bits, certificate.images)
