"""Exact intervals for what was counted on held-out images, and how several share one error.

Pure arithmetic: nothing here knows a trial, a split or a file. Images are independent draws from
those the model will meet (the target is the accuracy there, not on these images), as opposed to
`search.stats.confidence_sequences`, whose target is a finite set. Accuracies are in percent,
differences in points.

One interval is exact: it misses with probability `error` at most, at every number of images and
every accuracy, no normal approximation. DataParallel share the error by Bonferroni's inequality,
which needs no assumption on how their accuracies depend on each other. Sidak's product would need
one, and at 20 intervals would give each 0.00256 where Bonferroni gives 0.0025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv
from scipy.stats import binom

Floats = NDArray[np.float64]

#: of a paired interval's error, the part that bounds how often the two disagree
NUISANCE = 0.1
#: mass of a binomial distribution that a sum leaves out; it is added to the tail
LEFT_OUT = 1e-9
#: of an end that is looked for, as a fraction; ends are rounded outwards
PRECISION = 1e-6
#: what the first round of several gets of the error; later ones halve the rest
FIRST_ROUND = 0.9


def clopper_pearson(right: int, images: int, error: float) -> tuple[float, float]:
    """Accuracy in percent: [low, high] misses it with probability `error` at most, half of it on
    either side.

    Clopper and Pearson, "The use of confidence or fiducial limits" (Biometrika 26, 1934).
    """
    _check(right, images, error)
    low = 0.0 if right == 0 else float(betaincinv(right, images - right + 1, error / 2))
    high = 1.0 if right == images else float(betaincinv(right + 1, images - right, 1 - error / 2))
    return 100 * low, 100 * high


@lru_cache(maxsize=4096)
def paired_difference(gained: int, lost: int, images: int, error: float) -> tuple[float, float]:
    """Difference of two accuracies on the same images in points: [low, high], exact.

    gained: images that the first has right and the second wrong; lost: the other way round.

    With p, q the chances of the two, S = gained - lost has mean n(p - q); how often they disagree,
    p + q, is a nuisance. It is at most u, but for NUISANCE of the error (Berger and Boos, JASA 89,
    1994), and for a given difference the chance that S is so far out is largest at u: where p + q
    <= 1/2, n + S is a sum of 2n independent Bernoulli variables, so that its mode is less than 1
    from its mean (Darroch, Ann. Math. Stat. 35, 1964); and by the derivative of a binomial's tail
    the chance of S <= t grows with p + q where, for n - 1 images, P(S = t + 1) >= P(S = t): below
    the mode. Where they may disagree on more than half of all images, p and q are bounded apart.
    """
    if min(gained, lost) < 0:
        raise ValueError(f"images are counted from 0, got {gained} gained and {lost} lost")
    _check(gained + lost, images, error)
    most = _upper(gained + lost, images, NUISANCE * error)
    if most > 0.5:
        ends = [clopper_pearson(count, images, error / 2) for count in (gained, lost)]
        return ends[0][0] - ends[1][1], ends[0][1] - ends[1][0]
    tail = (1 - NUISANCE) * error / 2
    disagree = _spread(images, most)
    high = _highest(gained - lost, images, most, tail, disagree)
    low = -_highest(lost - gained, images, most, tail, disagree)
    return 100 * low, 100 * high


def _spread(images: int, chance: float) -> tuple[Floats, Floats]:
    """Numbers of images that a binomial distribution can come to, and the chance of each."""
    ends = binom.ppf(LEFT_OUT / 2, images, chance), binom.isf(LEFT_OUT / 2, images, chance)
    counts = np.arange(int(ends[0]), int(ends[1]) + 1, dtype=np.float64)
    return counts, binom.pmf(counts, images, chance)


def at_most(t: int, up: float, disagree: tuple[Floats, Floats]) -> float:
    """P(S <= t); of those images that disagree each adds 1 with chance `up`, or takes 1 away."""
    counts, chances = disagree
    ups = np.floor((counts + t) / 2)
    inside = (ups >= 0) & (ups < counts)
    at, of = np.where(inside, ups, 0), np.where(inside, counts, 1)
    below = np.where(inside, betainc(of - at, at + 1, 1 - up), ups >= counts)
    return min(1.0, float(chances @ below) + LEFT_OUT)


def _highest(
    t: int, images: int, most: float, tail: float, disagree: tuple[Floats, Floats]
) -> float:
    """The largest difference, as a fraction, at which S <= t still has a chance above `tail`."""
    # below it the nuisance's worst case is not known to be `most`
    low = max(-most, (t + 2) / max(1, images - 1))

    def beyond(difference: float) -> float:
        return math.log(at_most(t, (1 + difference / most) / 2, disagree) / tail)

    if low >= most:
        return most
    if beyond(low) <= 0:
        return low
    found: float = brentq(beyond, low, most, xtol=PRECISION)
    return min(most, found + PRECISION)


def mcnemar(against: int, disagree: int) -> float:
    """Chance of at least `against` of `disagree` disagreements where both are as likely (one-sided
    exact test: McNemar, Psychometrika 12, 1947, conditional on how many there are).
    """
    return float(binom.sf(against - 1, disagree, 0.5))


def holm(chances: Sequence[float], error: float) -> NDArray[np.bool_]:
    """Which hypotheses are rejected, none falsely but with probability `error`, whatever they have
    to do with each other (Holm, Scand. J. Stat. 6, 1979).
    """
    p = np.asarray(chances, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    small = p[order] <= error / (len(p) - np.arange(len(p)))
    rejected = np.zeros(len(p), dtype=bool)
    rejected[order] = np.logical_and.accumulate(small)
    return rejected


def shares(sizes: Sequence[int], error: float) -> list[float]:
    """The error of one interval in each round, of `sizes` intervals each, with `error` in all.

    Whether there is a later round may depend on what earlier ones showed (somebody looked, and
    went on), so no round may change what an earlier one was given.
    """
    rest = (1 - FIRST_ROUND) * error
    parts = (FIRST_ROUND * error if i == 0 else rest * 0.5**i for i in range(len(sizes)))
    return [part / max(1, size) for part, size in zip(parts, sizes, strict=True)]


def _upper(count: int, images: int, error: float) -> float:
    """One-sided upper bound on a chance."""
    return 1.0 if count == images else float(betaincinv(count + 1, images - count, 1 - error))


def _check(count: int, images: int, error: float) -> None:
    if not 0 <= count <= images or images < 1:
        raise ValueError(f"{count} of {images} images: accepted is 0 <= count <= images, 1 or more")
    if not 0 < error < 1 or math.isnan(error):
        raise ValueError(f"the error is {error}: accepted is 0 < error < 1")
