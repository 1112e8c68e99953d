"""Exact tails of what is seen of a finite set of images, drawn without replacement.

Pure arithmetic on counts. Nothing here knows a trial, a cost or a look.

Of M images a reference model's correctness is known on every one: it has `right` right and `wrong`
wrong. A candidate is seen on some of both. On the images that the reference has right it loses L
in all, on the others it gains G, and both are unknown: its accuracy on all is (right - L + G) / M.
Given how many of either kind were seen, the losses and gains among them are two independent
hypergeometric variables, because the order of the images is random. That is all that is assumed:
no normal approximation decides anything, and once every image was seen nothing is left open.
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

#: of an error, what goes to bounding the number of gains, which is of no interest in itself
NUISANCE = 0.1
#: how far below the error, in nats, the probability is that is left outside the sums
OUTSIDE = 7.0
#: intervals of the number of gains that are looked at together
CELLS = 16
#: numbers that are tried at once where a bound is looked for
FORKS = 12
#: evidence that falls short by this factor under a normal approximation is not computed exactly
HOPELESS = 1000.0


@functools.lru_cache(maxsize=8)
def _log_factorials(images: int) -> Floats:
    return np.asarray(gammaln(np.arange(images + 1) + 1.0))


def hypergeometric(count: Ints, images: int, marked: Ints, drawn: int) -> Floats:
    """Chance that `count` of `drawn` images are marked where `marked` of all `images` are.

    count and marked broadcast; 0 where the count is impossible.
    """
    possible = (count >= 0) & (count <= marked) & (count <= drawn)
    possible &= drawn - count <= images - marked
    k = np.where(possible, count, np.maximum(0, drawn - (images - marked)))
    log = _log_factorials(images)
    chance = (
        log[marked] - log[k] - log[marked - k]
        + log[images - marked] - log[drawn - k] - log[images - marked - drawn + k]
        - (log[images] - log[drawn] - log[images - drawn])
    )  # fmt: skip
    return np.where(possible, np.exp(chance), 0.0)


def most_of(seen: int, drawn: int, images: int, error: float) -> int:
    """Upper bound on how many of `images` are marked when `seen` of `drawn` are, at error `error`
    (Clopper and Pearson's, for a finite set): the largest number under which so few, or fewer,
    have a chance above the error.
    """
    low, high = seen, images - (drawn - seen)
    # where at least as large a part of all is marked as was seen, fewer than these are unlikely
    outside = error * math.exp(-OUTSIDE)
    reach = _reach(min(drawn, images - drawn) / 4, -math.log(outside))
    counts = np.arange(max(0, math.floor(seen - reach)), seen + 1)
    while low < high:
        tried = np.unique(np.linspace(low + 1, high, FORKS).astype(np.int64))
        chance = hypergeometric(counts, images, tried[:, None], drawn).sum(axis=1)
        # it falls with the number, but for what is marked less than was seen: that is likely
        likely = (chance + outside > error) | (tried * drawn <= seen * images)
        at = int(likely.sum())
        low, high = (
            low if at == 0 else int(tried[at - 1]),
            high if at == len(tried) else int(tried[at]) - 1,
        )
    return low


def least_of(seen: int, drawn: int, images: int, error: float) -> int:
    """Lower bound, likewise."""
    return images - most_of(drawn - seen, drawn, images, error)


@dataclass(frozen=True)
class Seen:
    """A candidate beside a reference whose correctness is known on all images.

    right, wrong: how many of all images the reference has right and wrong; of these the candidate
    was seen on `right_seen` and `wrong_seen`, and there it lost and gained so many.
    """

    right: int
    wrong: int
    right_seen: int
    wrong_seen: int
    lost: int
    gained: int

    @classmethod
    def of(cls, candidate: Bits, reference: Bits) -> Seen:
        """candidate [n], reference [M]: correctness, image by image in one order."""
        n, images, right = len(candidate), len(reference), int(reference.sum())
        head = reference[:n]
        had, both, own = int(head.sum()), int((head & candidate).sum()), int(candidate.sum())
        return cls(right, images - right, had, n - had, had - both, own - both)

    def refutes(self, wanted: int, error: float) -> bool:
        """Whether "the candidate is right on at least `wanted` of all images" is refuted.

        Where it is true, the chance of saying so is at most `error`, whatever L and G are.

        The sample is judged by the estimated shortfall over its standard error, with L and G where
        the claim puts them; then the exact probability of a sample at least as bad is summed. It is
        taken at the worst G that is left by an interval for G, which costs `NUISANCE` of the error
        (Berger and Boos, "P values maximized over a confidence set for the nuisance parameter",
        JASA 89, 1994).
        """
        allowed = self.right - wanted  # the claim: L - G <= allowed
        most_lost = self.right - self.right_seen + self.lost
        low = max(self.gained, self.lost - allowed)
        high = self.wrong - self.wrong_seen + self.gained
        if low > high:  # impossible already
            return True
        if self.right_seen == 0 or wanted <= 0:
            return False
        shortfall = float(self._shortfall(np.array(self.lost), np.array(self.gained), allowed))
        if shortfall <= NormalDist().inv_cdf(max(0.5, 1 - HOPELESS * error)):
            return False
        tail = _Tail(self, allowed, most_lost, shortfall, OUTSIDE - math.log(error))
        likely = self.wrong * self.gained / max(1, self.wrong_seen)
        likely += self.right * self.lost / self.right_seen - allowed
        middle = min(max(low, round(likely / 2)), high)
        if tail.above(middle, middle) > error:
            return False
        left = error * (1 - 4 * math.exp(-OUTSIDE))
        if self.wrong_seen < self.wrong:
            side = NUISANCE * error / 2
            left -= 2 * side
            low = max(low, least_of(self.gained, self.wrong_seen, self.wrong, side))
            high = min(high, most_of(self.gained, self.wrong_seen, self.wrong, side))
        return low > high or tail.is_below(left, low, high)

    def _shortfall(self, lost: NDArray, gained: NDArray, allowed: int) -> Floats:
        """How far (L - G) seems above `allowed`, in standard errors; where it is, it rises with
        what is lost. Broadcasts.
        """
        losses = self.right * lost / self.right_seen
        gains = self.wrong * gained / max(1, self.wrong_seen)
        # few disagreements say little about how many there are
        both = np.maximum(losses + gains, -3 * allowed)
        variance = _variance((both + allowed) / 2, self.right, self.right_seen)
        variance += _variance((both - allowed) / 2, self.wrong, self.wrong_seen)
        return np.asarray((losses - gains - allowed) / np.sqrt(variance + 1e-9))


class _Tail:
    """Chances of samples that speak against a claim as loudly as one that was seen.

    Losses grow with L and gains with G, so that an interval of G, with L as large as the claim
    allows, is bounded by the tail at its largest L and its smallest G.
    """

    def __init__(
        self, seen: Seen, allowed: int, most_lost: int, shortfall: float, nats: float
    ) -> None:
        self.seen, self.allowed, self.most_lost = seen, allowed, most_lost
        self.shortfall, self.nats = shortfall, nats

    def above(self, low: int, high: int) -> float:
        """For one interval of G."""
        return float(self._above(np.array([low]), np.array([high]))[0])

    def is_below(self, error: float, low: int, high: int) -> bool:
        """Whether it is at most `error` for every G in low..high; intervals whose bound does not
        say so are divided.
        """
        a, b = _divided(np.array([low]), np.array([high]))
        while True:
            worst = self._above(a, b)
            if (worst[a == b] > error).any():
                return False
            open_ = worst > error
            if not open_.any():
                return True
            at = int(worst.argmax())
            middle = int(a[at] + b[at]) // 2
            if self.above(middle, middle) > error:
                return False
            a, b = _divided(a[open_], b[open_])

    def _above(self, smallest: Ints, largest: Ints) -> Floats:
        seen = self.seen
        lost = np.minimum(largest + self.allowed, self.most_lost)
        gains_low, gains_high = _window(
            seen.wrong, int(smallest[0]), int(smallest[-1]), seen.wrong_seen, self.nats
        )
        gained = np.arange(gains_low, gains_high + 1)
        end = _window(seen.right, int(lost[0]), int(lost[-1]), seen.right_seen, self.nats)[1]
        start = self._start(gained, end + 1)
        count = np.arange(start[0], end + 1)
        losses = hypergeometric(count, seen.right, lost[:, None], seen.right_seen)
        gains = hypergeometric(gained, seen.wrong, smallest[:, None], seen.wrong_seen)
        above = np.zeros((len(lost), len(count) + 1))
        above[:, :-1] = np.cumsum(losses[:, ::-1], axis=1)[:, ::-1]
        return np.asarray((gains * above[:, start - start[0]]).sum(axis=1))

    def _start(self, gained: Ints, beyond: int) -> Ints:
        """From how many losses on a sample with so many gains is as bad; at most `beyond`.

        Made to rise with the gains, as bounding an interval of G needs it, by counting more
        samples as bad rather than fewer.
        """
        start, step = np.zeros(len(gained), dtype=np.int64), beyond
        while step > 1:
            step = -(-step // FORKS)
            tried = start + step * np.arange(1, FORKS)[:, None]
            fine = self.seen._shortfall(tried - 1, gained, self.allowed) < self.shortfall - 1e-9
            start += step * fine.sum(axis=0)
        start = np.minimum(start, beyond)
        return np.minimum.accumulate(start[::-1])[::-1]


def _variance(marked: Floats, images: int, drawn: int) -> Floats:
    """Of the number of marked images in all, estimated from `drawn` of them."""
    marked = np.clip(marked, 0, images)
    return marked * (images - marked) * (images - drawn) / (max(1, images - 1) * max(1, drawn))


def _reach(variance: float, nats: float) -> float:
    """How far from its mean a sum of bits with this variance, or less, is with chance exp(-nats)
    at most, on one side: Bernstein's inequality, which holds for drawing without replacement too
    (Hoeffding, JASA 58, 1963, theorem 4).
    """
    return nats / 3 + math.sqrt((nats / 3) ** 2 + 2 * nats * variance)


def _window(images: int, fewest: int, most: int, drawn: int, nats: float) -> tuple[int, int]:
    """Counts that a sample of `drawn` has, but for exp(-nats) on either side, where fewest..most
    of `images` are marked. What is left varies as what is drawn, so the fewer of both count.
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
    """The intervals a..b in smaller ones, `CELLS` in all or somewhat more."""
    parts = max(2, CELLS // len(a))
    starts, ends = [], []
    for low, high in zip(a.tolist(), b.tolist(), strict=True):
        step = -(-(high - low + 1) // parts)
        first = np.arange(low, high + 1, step)
        starts.append(first)
        ends.append(np.minimum(first + step - 1, high))
    return np.concatenate(starts), np.concatenate(ends)
