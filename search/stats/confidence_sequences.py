"""Confidence at every look: bets on what is still unseen, a floor under a cost, an estimate.

Pure arithmetic on numpy arrays. Nothing here knows a trial, a study or which look it is.

The `capital` of a bettor against a claim is a non-negative supermartingale that starts at 1 where
the claim is true, so that it ever reaches 1/a with chance a at most (Ville's inequality), however
often and for whatever reason it is looked at. It is the martingale for sampling without replacement
of Waudby-Smith and Ramdas, "Confidence sequences for sampling without replacement" (NeurIPS 2020),
with bets as in "Estimating means of bounded random variables by betting" (JRSS B 86(1), 2024,
sections 4 and 5): a mixture over fixed parts of the largest safe bet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vitpareto.search.errors import BadInput, Code
from vitpareto.search.stats.hypergeometric import Bits, Floats
from vitpareto.search.stats.intervals import Z95

#: bets, as parts of the largest that cannot lose everything; the capital is their mean
BETS = (0.05, 0.12, 0.25, 0.5, 0.9)
#: what is expected of a candidate before anything is seen, on images that the reference has right
#: and wrong, and how many images that expectation is worth
EXPECTED, WORTH = (0.9, 0.4), 2.0
#: images on whose mean cost one bet is made: costs vary little
BLOCK = 8


def log_capital(candidate: Bits, reference: Bits, wanted: int) -> float:
    """Log of the capital after betting against "the candidate is right on `wanted` images or more".

    candidate [n]: correctness on the images seen, in order; reference [M]: a model's on all. inf
    where the claim has become impossible.

    If it is true, the mean of what is left is at least m = (wanted - right so far) / left before
    every image. What is bet on is x = right - b * (reference - its mean over what is left): the
    second term has mean 0 whatever b is, as long as b is chosen before the image is seen, and b is
    the slope of a regression of candidate on reference so far, which leaves x the least variance.
    """
    n, images = len(candidate), len(reference)
    own, known = candidate.astype(np.float64), reference.astype(np.float64)
    left = images - np.arange(n)
    if wanted - own.sum() > images - n:
        return math.inf
    if n == 0:
        return 0.0
    beside = known[:n]
    right, had, both = (_before(x) for x in (own, beside, own * beside))
    fair, mean = (wanted - right) / left, (known.sum() - had) / left
    on_right = (both + WORTH * EXPECTED[0]) / (had + WORTH)
    on_wrong = (right - both + WORTH * EXPECTED[1]) / (np.arange(n) - had + WORTH)
    slope = np.maximum(0.0, on_right - on_wrong)
    gain = fair - (own - slope * (beside - mean))
    # the most that can be lost: right where the reference is wrong
    room = np.maximum(1 + slope * mean - fair, 1e-12)
    # once enough are right the claim is true: nothing is bet any more
    return _mixture(np.where(fair > 0, gain / room, 0.0))


def _before(x: Floats) -> Floats:
    """Sum of what came before each, [n]."""
    return np.concatenate([[0.0], np.cumsum(x[:-1])])


def _mixture(gains: Floats) -> float:
    """Log of the mean capital of all `BETS`; gains [n] as parts of what may be lost, >= -1."""
    logs = np.log1p(np.outer(BETS, gains)).sum(axis=1)
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


def cost_floor(costs: Floats, bounds: tuple[float, float], images: int, error: float) -> float:
    """Lower confidence bound on the mean cost of all `images`, valid at every look at once.

    costs [n]: of the images seen, in order, each within `bounds`. The largest mean that the capital
    has refuted, or the seen costs with the lowest possible ones for the rest, whichever is higher;
    the mean itself once all are seen.

    Raises BadInput if a cost is outside the bounds, because the result would not be a bound.
    """
    low, high = bounds
    n = len(costs)
    slack = 1e-9 * max(abs(low), abs(high))
    if n and not (low - slack <= costs.min() and costs.max() <= high + slack):
        raise BadInput(
            f"costs must be {low:g} to {high:g} (got {costs.min():g} to {costs.max():g})",
            Code.OUT_OF_RANGE, name="costs", got=(float(costs.min()), float(costs.max())),
        )  # fmt: skip
    sure = (float(costs.sum()) + (images - n) * low) / images
    blocks = n // BLOCK
    if high <= low or n == images or blocks == 0:
        return sure
    x = np.clip((costs[: blocks * BLOCK] - low) / (high - low), 0, 1)
    x = x.reshape(blocks, BLOCK).mean(axis=1)
    before, left = BLOCK * _before(x), images - BLOCK * np.arange(blocks)
    refuted, open_ = 0.0, float(x.mean())
    for _ in range(16):
        middle = (refuted + open_) / 2
        fair = (middle * images - before) / left
        if fair.min() <= 0:
            # so little in all would have been exceeded by what was seen
            impossible = middle * images < BLOCK * x.sum()
            refuted, open_ = (middle, open_) if impossible else (refuted, middle)
            continue
        if _mixture((x - fair) / fair) >= -math.log(error):
            refuted = middle
        else:
            open_ = middle
    return max(sure, low + refuted * (high - low))


@dataclass(frozen=True)
class Estimate:
    """An accuracy on all images in percent, with its 95 % interval."""

    value: float
    low: float
    high: float


def control_variate(candidate: Bits, dense: Bits) -> Estimate:
    """Accuracy on all images of a candidate seen on the first n: the dense model's on all, plus the
    mean paired difference on those seen.

    candidate [n], dense [M]. Unbiased at a number of images fixed beforehand; of a candidate that
    was stopped for what was seen it is biased downwards, and the interval with it. The interval is
    that of Agresti and Min ("Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005: half an image more in every cell), narrowed for
    the finite set, and no wider than what the images left can still make of the accuracy.
    """
    n, images = len(candidate), len(dense)
    if n == 0:
        raise BadInput("an estimate needs at least one image (got 0)", Code.EMPTY, name="candidate")
    gained = int((candidate & ~dense[:n]).sum())
    lost = int((~candidate & dense[:n]).sum())
    whole = 100 * float(dense.mean())
    right = int(candidate.sum())
    least, most = 100 * right / images, 100 * (right + images - n) / images
    value = min(most, max(least, whole + 100 * (gained - lost) / n))
    cells, a, b = n + 2, gained + 0.5, lost + 0.5
    centre = (a - b) / cells
    spread = math.sqrt(max(0.0, a + b - (a - b) ** 2 / cells)) / cells
    spread *= math.sqrt((images - n) / max(1, images - 1))
    low, high = (whole + 100 * (centre + sign * Z95 * spread) for sign in (-1, 1))
    # it always holds the estimate
    return Estimate(value, min(value, max(least, low)), max(value, min(most, high)))
