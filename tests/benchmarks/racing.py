"""Racing rules compared: images spent, front members lost; simulated and on real models.

    python -m tests.benchmarks.racing --pool FILE.npz [--studies 2000] [--model M --data D]

Simulated: studies whose candidates are nearly tied, with two and three objectives; an upper bound
(exact, 95 %) on the chance that a study loses a member of its true front. Real: recipes of a pool
(`pool.py`), which is measured first where its file is not there yet; searches in one order of them,
with the images shuffled anew each time, are replayed under every rule.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import beta

from tests.benchmarks.pool import Pool, build
from tests.search.races import front_of, race_study, simulated
from vitpareto.search.stats.racing import DEFAULT, RULES, Rule, rungs
from vitpareto.search.study.job import SearchConfig

ERROR = 0.05
CANDIDATES, IMAGES = 40, 400


def upper(lost: int, studies: int) -> float:
    """Clopper-Pearson, one-sided 95 %, in percent."""
    return 100.0 if lost == studies else 100 * float(beta.ppf(0.95, lost + 1, studies - lost))


def simulate(studies: int) -> None:
    """A table: every rule, and one that is wrong on purpose."""
    print(
        f"simulated: {studies} studies of {CANDIDATES} candidates on {IMAGES} images, error {ERROR}"
        "\n| rule | objectives | accuracies | studies that lost | at most (95 %) | images |"
        "\n|---|---|---|---|---|---|"
    )
    rules: dict[str, tuple[Rule, bool]] = {name: (rule, True) for name, rule in RULES.items()}
    rules[f"{DEFAULT.name}, error not shared"] = (DEFAULT, False)
    for name, (rule, spend) in rules.items():
        for objectives, spread in ((2, 0.02), (2, 0.2), (3, 0.02)):
            draw = np.random.default_rng(7)
            lost = images = whole = 0
            for _ in range(studies):
                bits, costs = simulated(draw, CANDIDATES, IMAGES, objectives, spread)
                one = race_study(bits, costs, rule, ERROR, spend=spend)
                lost, images, whole = lost + bool(one.lost), images + one.images, whole + one.whole
            apart = "nearly tied" if spread < 0.1 else "spread"
            print(
                f"| {name} | {objectives} | {apart} | {lost} | {upper(lost, studies):.2f} % | "
                f"{100 * images / whole:.1f} % |",
                flush=True,
            )


def real_bits(given: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Bits [N, M] and GMACs [N, 1] of a pool's recipes, in an order drawn once; the dense model
    first.
    """
    if not given.pool.exists():
        config = SearchConfig.of({
            "model": given.model, "data": given.data, "images": given.images,
            "weights": given.weights, "device": "cpu",
        })  # fmt: skip
        build(config, given.random, given.tpe).save(given.pool)
    pool = Pool.load(given.pool)
    drawn = np.random.default_rng(0).permutation(np.arange(1, len(pool.gmacs)))
    at = np.concatenate([[0], drawn[: given.recipes - 1]])
    return pool.right[at], pool.gmacs[at, None]


def spent(
    bits: np.ndarray, costs: np.ndarray, rule: Rule, looked: Sequence[int], orders: int
) -> tuple[float, int, float]:
    """Median share of images over orders of the images, front points lost, ms a look."""
    draw = np.random.default_rng(0)
    shares, lost, looks, begin = [], 0, 0, time.perf_counter()
    for _ in range(orders):
        shuffled = bits[:, draw.permutation(bits.shape[1])]
        one = race_study(shuffled, costs, rule, ERROR, looked)
        shares.append(100 * one.images / one.whole)
        lost, looks = lost + len(one.lost), looks + one.looks
    return float(np.median(shares)), lost, 1e3 * (time.perf_counter() - begin) / looks


def replay(bits: np.ndarray, costs: np.ndarray, orders: int) -> None:
    """Two tables: the rules, then where the default looks."""
    many, images = bits.shape
    print(
        f"\nreplayed: {many} recipes on {images} images, {orders} orders of the images, error "
        f"{ERROR}, front of {len(front_of(bits, costs))}"
        "\n| rule | images, median | members lost, all orders | ms a look |\n|---|---|---|---|"
    )
    for name, rule in RULES.items():
        share, lost, each = spent(bits, costs, rule, rungs(images), orders)
        print(f"| {name} | {share:.1f} % | {lost} | {each:.2f} |", flush=True)
    print("\n| first look | growth | looks | images, median |\n|---|---|---|---|")
    for first in (16, 32, 64, 128):
        for growth in (1.2, 1.3, 1.5, 2.0):
            looked = rungs(images, first=first, share=0, growth=growth)
            share, _, _ = spent(bits, costs, DEFAULT, looked, max(3, orders // 3))
            print(f"| {first} | {growth} | {len(looked) - 1} | {share:.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--weights")
    parser.add_argument("--images", type=int)
    parser.add_argument("--random", type=int, default=250, help="recipes of a worker, to measure")
    parser.add_argument("--tpe", type=int, default=150)
    parser.add_argument("--recipes", type=int, default=150, help="of the pool, to replay")
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--pool", type=Path, required=True, help="measured recipes (.npz)")
    given = parser.parse_args()
    if given.studies:
        simulate(given.studies)
    replay(*real_bits(given), given.orders)


if __name__ == "__main__":
    main()
