"""Exact tests on a finite set of images that is sampled without replacement.

Arithmetic on counts. It may not know trials, costs or looks.

Of M images, a reference model has `right` right and `wrong` wrong; its correctness is known on all
of them. A candidate is seen on some images of both groups. It loses L images of the first group and
gains G of the second; both numbers are unknown, and its accuracy is (right - L + G) / M. Given the
number of images seen in each group, the observed losses and gains are two independent
hypergeometric variables, because the order of the images is random. Nothing else is assumed. The
normal approximation only decides which tests are worth computing exactly.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

Bits = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Fraction of the error for the interval of the nuisance parameter, the number of gains.
NUISANCE_SHARE = 0.1
#: Sums omit terms whose total probability is this many nats below the error.
TRUNCATION_NATS = 7.0
#: Number of intervals of G that are bounded at a time.
INTERVALS = 16
#: Number of candidates that a step of a search for a bound evaluates.
CANDIDATES = 12
#: No exact test if the p-value of the normal approximation exceeds the error by this factor.
PREFILTER_FACTOR = 1000.0


@functools.lru_cache(maxsize=8)
def _log_factorials(images: int) -> Floats:
    return np.asarray(gammaln(np.arange(images + 1) + 1.0))


def hypergeometric(count: Ints, images: int, marked: Ints, drawn: int) -> Floats:
    """Return the probability that `count` of `drawn` images are marked if `marked` of `images` are.

    `count` and `marked` broadcast. The probability of an impossible count is 0.
    """
    possible = (count >= 0) & (count <= marked) & (count <= drawn)
    possible &= drawn - count <= images - marked
    k = np.where(possible, count, np.maximum(0, drawn - (images - marked)))
    log = _log_factorials(images)
    log_probability = (
        log[marked] - log[k] - log[marked - k]
        + log[images - marked] - log[drawn - k] - log[images - marked - drawn + k]
        - (log[images] - log[drawn] - log[images - drawn])
    )  # fmt: skip
    return np.where(possible, np.exp(log_probability), 0.0)


def upper_bound(seen: int, drawn: int, images: int, error: float) -> int:
    """Return an upper confidence bound on the number of marked images.

    This is the Clopper-Pearson bound for a finite set: the largest number of marked images for
    which at most `seen` marked images in the sample have a probability above `error`.

    Args:
        seen: marked images in the sample.
        drawn: images in the sample.
        images: images in all.
        error: probability that the bound is too low.
    """
    low, high = seen, images - (drawn - seen)
    # smaller counts are negligible for all tried numbers whose rate is at least the observed one
    outside = error * math.exp(-TRUNCATION_NATS)
    reach = _reach(min(drawn, images - drawn) / 4, -math.log(outside))
    counts = np.arange(max(0, math.floor(seen - reach)), seen + 1)
    while low < high:
        tried = np.unique(np.linspace(low + 1, high, CANDIDATES).astype(np.int64))
        probability = hypergeometric(counts, images, tried[:, None], drawn).sum(axis=1)
        # the probability falls with the number of marked images above the observed rate
        likely = (probability + outside > error) | (tried * drawn <= seen * images)
        at = int(likely.sum())
        low, high = (
            low if at == 0 else int(tried[at - 1]),
            high if at == len(tried) else int(tried[at]) - 1,
        )
    return low


def lower_bound(seen: int, drawn: int, images: int, error: float) -> int:
    """Return the corresponding lower confidence bound."""
    return images - upper_bound(drawn - seen, drawn, images, error)


@dataclass(frozen=True)
class PairedCounts:
    """Observed losses and gains of a candidate against a reference that is known on all images.

    Attributes:
        right, wrong: number of images that the reference has right and wrong.
        right_seen, wrong_seen: number of these on which the candidate was evaluated.
        lost: images that only the reference has right, among `right_seen`.
        gained: images that only the candidate has right, among `wrong_seen`.
    """

    right: int
    wrong: int
    right_seen: int
    wrong_seen: int
    lost: int
    gained: int

    @classmethod
    def of(cls, candidate: Bits, reference: Bits) -> PairedCounts:
        """Count from correctness: candidate [n] and reference [M] in the same image order."""
        n, images, right = len(candidate), len(reference), int(reference.sum())
        prefix = reference[:n]
        right_seen, both = int(prefix.sum()), int((prefix & candidate).sum())
        gained = int(candidate.sum()) - both
        return cls(right, images - right, right_seen, n - right_seen, right_seen - both, gained)

    def rejects(self, wanted: int, error: float) -> bool:
        """Test the hypothesis that the candidate is right on at least `wanted` of all images.

        If the hypothesis is true, it is rejected with probability `error` at most, for all L and G.

        The test statistic is the estimated shortfall divided by its standard error under the
        hypothesis. The p-value is the exact probability of a statistic at least as large, maximised
        over a confidence interval of G, which takes `NUISANCE_SHARE` of the error (Berger and Boos,
        "P values maximized over a confidence set for the nuisance parameter", JASA 89, 1994).
        """
        allowed = self.right - wanted  # the hypothesis is L - G <= allowed
        most_lost = self.right - self.right_seen + self.lost
        low = max(self.gained, self.lost - allowed)
        high = self.wrong - self.wrong_seen + self.gained
        if low > high:  # no L and G satisfy the hypothesis
            return True
        if self.right_seen == 0 or wanted <= 0:
            return False
        shortfall = float(self._shortfall(np.array(self.lost), np.array(self.gained), allowed))
        if shortfall <= NormalDist().inv_cdf(max(0.5, 1 - PREFILTER_FACTOR * error)):
            return False
        p_value = _PValue(self, allowed, most_lost, shortfall, TRUNCATION_NATS - math.log(error))
        likely = self.wrong * self.gained / max(1, self.wrong_seen)
        likely += self.right * self.lost / self.right_seen - allowed
        middle = min(max(low, round(likely / 2)), high)
        if p_value.bound(middle, middle) > error:
            return False
        remaining_error = error * (1 - 4 * math.exp(-TRUNCATION_NATS))
        if self.wrong_seen < self.wrong:
            side_error = NUISANCE_SHARE * error / 2
            remaining_error -= 2 * side_error
            low = max(low, lower_bound(self.gained, self.wrong_seen, self.wrong, side_error))
            high = min(high, upper_bound(self.gained, self.wrong_seen, self.wrong, side_error))
        return low > high or p_value.is_below(remaining_error, low, high)

    def _shortfall(self, lost: NDArray, gained: NDArray, allowed: int) -> Floats:
        """Return the estimate of L - G - allowed in standard errors. Broadcasts.

        Where it is positive, it increases with the losses.
        """
        losses = self.right * lost / self.right_seen
        gains = self.wrong * gained / max(1, self.wrong_seen)
        # few observed disagreements estimate their number poorly, so it has a lower limit
        both = np.maximum(losses + gains, -3 * allowed)
        variance = _variance((both + allowed) / 2, self.right, self.right_seen)
        variance += _variance((both - allowed) / 2, self.wrong, self.wrong_seen)
        return np.asarray((losses - gains - allowed) / np.sqrt(variance + 1e-9))


class _PValue:
    """The p-value: the probability of samples whose statistic is at least as large as the observed.

    It is bounded for an interval of G and the largest L that the hypothesis allows. Losses increase
    stochastically with L, and gains with G, so the bound is the probability at the largest L and
    the smallest G of the interval.

    Attributes:
        counts: the observed losses and gains.
        allowed: the hypothesis is L - G <= allowed.
        most_lost: the largest possible L.
        shortfall: the observed statistic, in standard errors.
        nats: sums leave out counts of probability exp(-nats) at most.
    """

    def __init__(
        self, counts: PairedCounts, allowed: int, most_lost: int, shortfall: float, nats: float
    ) -> None:
        self.counts, self.allowed, self.most_lost = counts, allowed, most_lost
        self.shortfall, self.nats = shortfall, nats

    def bound(self, low: int, high: int) -> float:
        """Return the bound for the interval low..high of G."""
        return float(self._bounds(np.array([low]), np.array([high]))[0])

    def is_below(self, error: float, low: int, high: int) -> bool:
        """Return whether the p-value is at most `error` for every G in low..high.

        Intervals whose bound exceeds the error are subdivided.
        """
        a, b = _divided(np.array([low]), np.array([high]))
        while True:
            worst = self._bounds(a, b)
            if (worst[a == b] > error).any():
                return False
            open_ = worst > error
            if not open_.any():
                return True
            at = int(worst.argmax())
            middle = int(a[at] + b[at]) // 2
            if self.bound(middle, middle) > error:
                return False
            a, b = _divided(a[open_], b[open_])

    def _bounds(self, smallest: Ints, largest: Ints) -> Floats:
        """Return the bound for each of the intervals smallest..largest of G."""
        counts = self.counts
        lost = np.minimum(largest + self.allowed, self.most_lost)
        gains_low, gains_high = _window(
            counts.wrong, int(smallest[0]), int(smallest[-1]), counts.wrong_seen, self.nats
        )
        gained = np.arange(gains_low, gains_high + 1)
        end = _window(counts.right, int(lost[0]), int(lost[-1]), counts.right_seen, self.nats)[1]
        start = self._start(gained, end + 1)
        count = np.arange(start[0], end + 1)
        losses = hypergeometric(count, counts.right, lost[:, None], counts.right_seen)
        gains = hypergeometric(gained, counts.wrong, smallest[:, None], counts.wrong_seen)
        above = np.zeros((len(lost), len(count) + 1))
        above[:, :-1] = np.cumsum(losses[:, ::-1], axis=1)[:, ::-1]
        return np.asarray((gains * above[:, start - start[0]]).sum(axis=1))

    def _start(self, gained: Ints, beyond: int) -> Ints:
        """Return the number of losses, at most `beyond`, from which the statistic is exceeded.

        One value per number of gains. The values are made non-decreasing in the gains, as the bound
        over an interval of G requires; this includes more samples, so the test is conservative.
        """
        start, step = np.zeros(len(gained), dtype=np.int64), beyond
        while step > 1:
            step = -(-step // CANDIDATES)
            tried = start + step * np.arange(1, CANDIDATES)[:, None]
            below = self.counts._shortfall(tried - 1, gained, self.allowed) < self.shortfall - 1e-9
            start += step * below.sum(axis=0)
        start = np.minimum(start, beyond)
        return np.minimum.accumulate(start[::-1])[::-1]


def _variance(marked: Floats, images: int, drawn: int) -> Floats:
    """Return the variance of the estimated number of marked images, from a sample of `drawn`."""
    marked = np.clip(marked, 0, images)
    return marked * (images - marked) * (images - drawn) / (max(1, images - 1) * max(1, drawn))


def _reach(variance: float, nats: float) -> float:
    """Return the one-sided deviation from the mean that has probability exp(-nats) at most.

    Bernstein's inequality for a sum of binary variables with at most this variance. It also holds
    for sampling without replacement (Hoeffding, JASA 58, 1963, theorem 4).
    """
    return nats / 3 + math.sqrt((nats / 3) ** 2 + 2 * nats * variance)


def _window(images: int, fewest: int, most: int, drawn: int, nats: float) -> tuple[int, int]:
    """Return the range of counts in a sample of `drawn` if fewest..most of `images` are marked.

    Counts outside have probability exp(-nats) at most on either side. The sample and its complement
    have the same variance, so the smaller of both is used.
    """
    if images == 0:
        return 0, 0
    smaller = min(drawn, images - drawn)
    middle = min(max(fewest, images / 2), most)
    variance = smaller * (middle / images) * (1 - middle / images)
    reach = _reach(variance, nats)
    low = math.floor(drawn * fewest / images - reach)
    high = math.ceil(drawn * most / images + reach)
    return max(0, low, drawn - (images - fewest)), min(drawn, most, high)


def _divided(a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Subdivide the intervals a..b into about `INTERVALS` in all."""
    parts = max(2, INTERVALS // len(a))
    starts, ends = [], []
    for low, high in zip(a.tolist(), b.tolist(), strict=True):
        step = -(-(high - low + 1) // parts)
        first = np.arange(low, high + 1, step)
        starts.append(first)
        ends.append(np.minimum(first + step - 1, high))
    return np.concatenate(starts), np.concatenate(ends)
