"""Racing rules compared: images spent, front members lost; simulated and on real models.

    python -m tests.benchmarks.racing [--studies 2000] [--model M --data D --images N]

Simulated: studies whose candidates are nearly tied, with two and three objectives; an upper bound
(exact, 95 %) on the chance that a study loses a member of its true front. Real: recipes drawn as a
search draws them, each measured once on all search images; then searches in their order, with the
images shuffled anew each time, are replayed under every rule.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
from scipy.stats import beta

from methods import BadInput, Recipe
from search import run
from search.config import SearchConfig
from search.racing import DEFAULT, RULES, Rule, rungs
from search.results import unpack_bits
from search.searcher import make_sampler
from search.trial import Workplace, run_trial
from tests.search.races import front_of, race_study, simulated

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
    """Bits [N, M] and GMACs [N, 1] of the recipes of a search; the dense model first."""
    if given.bits is not None and given.bits.exists():
        kept = np.load(given.bits)
        return kept["right"], kept["costs"][:, :1]
    with tempfile.TemporaryDirectory() as scratch:
        config = SearchConfig.of({
            "model": given.model, "data": given.data, "images": given.images, "store": scratch,
            "weights": given.weights, "device": "cpu",
        })  # fmt: skip
        prepared = run.prepare(config)
        place = Workplace.open(run.make_task(prepared, epoch="", threads=None))
        study = optuna.create_study(
            directions=["maximize", "minimize"], sampler=make_sampler(given.sampler, 0)
        )
        for _, params in prepared.space.preset_params():
            study.enqueue_trial(params)
        results = [run_trial(place, 0, Recipe())]
        known = {}
        while len(results) < given.recipes:
            asked = study.ask()
            try:
                recipe = prepared.space.suggest(asked, prepared.reshape)
                key = recipe.key(prepared.reshape(recipe))
            except BadInput:
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                continue
            if key not in known:
                known[key] = run_trial(place, len(results), recipe)
                results.append(known[key])
            values = known[key].values
            study.tell(asked, [values["top1"], values["gmacs"]])
    bits = np.stack([unpack_bits(r.bits, r.images) for r in results])
    costs = np.array([[r.values["gmacs"]] for r in results])
    if given.bits is not None:
        np.savez_compressed(given.bits, right=bits, costs=costs)
    return bits, costs


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
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--recipes", type=int, default=150)
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--bits", type=Path, help="keep the measured bits here (.npz)")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if given.studies:
        simulate(given.studies)
    replay(*real_bits(given), given.orders)


if __name__ == "__main__":
    main()
