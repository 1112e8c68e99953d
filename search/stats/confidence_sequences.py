"""Bounds that hold at every look, and the control-variate estimate of an accuracy.

Arithmetic on numpy arrays. It may not know trials, studies or looks.

The capital of a bettor against a true hypothesis is a non-negative supermartingale that starts at
1. By Ville's inequality it ever reaches 1/a with probability a at most, however often it is
checked. The martingale is that of Waudby-Smith and Ramdas, "Confidence sequences for sampling
without replacement" (NeurIPS 2020), with bets as in "Estimating means of bounded random variables
by betting" (JRSS B 86(1), 2024, sections 4 and 5): a mixture over fixed fractions of the largest
bet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vitpareto.search.errors import BadInput, Code
from vitpareto.search.stats.hypergeometric import Bits, Floats
from vitpareto.search.stats.intervals import Z95

#: Bets as fractions of the largest one that keeps the capital non-negative; they are averaged.
BET_FRACTIONS = (0.05, 0.12, 0.25, 0.5, 0.9)
#: Prior mean of the candidate's accuracy on images that the reference has right and wrong, and the
#: weight of the prior in images.
PRIOR_MEANS, PRIOR_WEIGHT = (0.9, 0.4), 2.0
#: Number of images per bet on costs, which vary little.
BLOCK = 8


def log_capital(candidate: Bits, reference: Bits, wanted: int) -> float:
    """Return the log capital against the hypothesis "right on at least `wanted` of all images".

    Under the hypothesis, the mean of the remaining images is at least m = (wanted - right so far) /
    remaining before every image. The bet is on x = right - b * (reference - its mean over the
    remaining images). The second term has mean 0 for every b that is chosen before the image is
    seen; b is the slope of the regression of candidate on reference so far, which minimises the
    variance of x.

    Args:
        candidate: [n], correctness on the images seen, in order.
        reference: [M], a model's correctness on all images.
        wanted: number of images of the hypothesis.

    Returns:
        The log capital; inf if the hypothesis has become impossible.
    """
    n, images = len(candidate), len(reference)
    seen, known = candidate.astype(np.float64), reference.astype(np.float64)
    remaining = images - np.arange(n)
    if wanted - seen.sum() > images - n:
        return math.inf
    if n == 0:
        return 0.0
    prefix = known[:n]
    right, reference_right, both = (_sum_before(x) for x in (seen, prefix, seen * prefix))
    fair, mean = (wanted - right) / remaining, (known.sum() - reference_right) / remaining
    on_right = (both + PRIOR_WEIGHT * PRIOR_MEANS[0]) / (reference_right + PRIOR_WEIGHT)
    on_wrong = (right - both + PRIOR_WEIGHT * PRIOR_MEANS[1]) / (
        np.arange(n) - reference_right + PRIOR_WEIGHT
    )
    slope = np.maximum(0.0, on_right - on_wrong)
    gain = fair - (seen - slope * (prefix - mean))
    # the largest loss: the candidate is right and the reference is wrong
    largest_loss = np.maximum(1 + slope * mean - fair, 1e-12)
    # the hypothesis is true once `wanted` images are right: no further bets
    return _log_mixture(np.where(fair > 0, gain / largest_loss, 0.0))


def _sum_before(x: Floats) -> Floats:
    """Return the sum of the elements before each, [n]."""
    return np.concatenate([[0.0], np.cumsum(x[:-1])])


def _log_mixture(gains: Floats) -> float:
    """Return the log of the mean capital of all bets.

    gains: [n], relative to the largest loss, >= -1.
    """
    logs = np.log1p(np.outer(BET_FRACTIONS, gains)).sum(axis=1)
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


def cost_floor(costs: Floats, bounds: tuple[float, float], images: int, error: float) -> float:
    """Return a lower confidence bound on the mean cost, valid at all looks simultaneously.

    The larger of two bounds: the largest mean that the capital rejects, and the mean with the
    lowest possible cost for all remaining images. Once all images are seen it is the mean.

    Args:
        costs: [n], of the images seen, in order.
        bounds: smallest and largest possible cost of an image.
        images: number of images in all.
        error: probability that the bound ever exceeds the mean.

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
    certain = (float(costs.sum()) + (images - n) * low) / images
    blocks = n // BLOCK
    if high <= low or n == images or blocks == 0:
        return certain
    x = np.clip((costs[: blocks * BLOCK] - low) / (high - low), 0, 1)
    x = x.reshape(blocks, BLOCK).mean(axis=1)
    before, remaining = BLOCK * _sum_before(x), images - BLOCK * np.arange(blocks)
    rejected, accepted = 0.0, float(x.mean())
    for _ in range(16):
        middle = (rejected + accepted) / 2
        fair = (middle * images - before) / remaining
        if fair.min() <= 0:
            # the costs seen already exceed this total
            impossible = middle * images < BLOCK * x.sum()
            rejected, accepted = (middle, accepted) if impossible else (rejected, middle)
            continue
        if _log_mixture((x - fair) / fair) >= -math.log(error):
            rejected = middle
        else:
            accepted = middle
    return max(certain, low + rejected * (high - low))


@dataclass(frozen=True)
class Estimate:
    """An accuracy on all images in percent, with its 95 % interval."""

    value: float
    low: float
    high: float


def control_variate(candidate: Bits, dense: Bits) -> Estimate:
    """Estimate the accuracy on all images of a candidate that was seen on the first n.

    The estimate is the dense model's accuracy on all images plus the mean paired difference on the
    images seen. It is unbiased if n is fixed beforehand. If the candidate was stopped because of
    the images seen, the estimate and its interval are biased downwards.

    The interval is that of Agresti and Min ("Simple improved confidence intervals for comparing
    matched proportions", Statistics in Medicine 24, 2005; it adds half an image to every cell),
    with the finite population correction, and within the accuracies that are still possible.

    Args:
        candidate: [n], correctness on the images seen, in order.
        dense: [M], correctness of the dense model on all images.

    Raises BadInput if no image was seen.
    """
    n, images = len(candidate), len(dense)
    if n == 0:
        raise BadInput(
            "candidate must have at least one image (got 0)", Code.EMPTY, name="candidate"
        )
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
    # the interval always contains the estimate
    return Estimate(value, min(value, max(least, low)), max(value, min(most, high)))
