"""Made-up studies on disk, for tests of pages and tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vitpareto.methods import Recipe
from vitpareto.search.stats.intervals import wilson_interval
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult, pack_bits

IMAGES = 400
#: a recipe of each method for a keep rate
RECIPES = {
    "tome": lambda rate: Recipe.of("tome", r=max(1, round(20 * (1 - rate)))),
    "topk": lambda rate: Recipe.of("topk", keep_rate=round(rate, 4), prune_layers=[3, 6, 9]),
    "evit": lambda rate: Recipe.of("evit", keep_rate=round(rate, 4), prune_layers=[3, 6, 9]),
    "random": lambda rate: Recipe.of("random", keep_rate=round(rate, 4), prune_layers=[3, 6, 9]),
}


def write_study(
    store: Path, name: str, trials: int, model: str = "digits", seed: int = 0, images: str = "def"
) -> StudyFolder:
    """Finished, stopped and failed trials whose accuracy increases with cost, with noise."""
    folder = StudyFolder(store / name)
    folder.create()
    folder.identity.settle({"model": model, "model_fingerprint": "abc", "data_fingerprint": images})
    folder.write_job(
        JobRequest({"objectives": ["top1", "gmacs"], "model": model, "data": "digits"})
    )
    rng = np.random.default_rng(seed)
    right = rng.random(IMAGES) < 0.8
    folder.trials.write(result(0, Recipe(), right, 4.6, latency_ms=20.0))
    for n in range(1, trials):
        method = list(RECIPES)[n % len(RECIPES)]
        rate = float(rng.uniform(0.3, 0.95))
        lost = rng.random(IMAGES) < (1 - rate) ** 2 * rng.uniform(0.2, 1.0)
        bits = right & ~lost
        recipe = RECIPES[method](rate)
        if n % 29 == 0:
            folder.trials.write(
                TrialResult(n, "failed", RecordedRecipe.of(recipe), f"k{n}", reason="it raised")
            )
        elif n % 5 == 0:
            folder.trials.write(result(n, recipe, bits[:100], 4.6 * rate, "raced_out"))
        else:
            folder.trials.write(result(n, recipe, bits, 4.6 * rate, latency_ms=20 * rate**0.5))
    return folder


def result(
    n: int, recipe: Recipe, bits: np.ndarray, gmacs: float, state: str = "finished", **more: float
) -> TrialResult:
    seen = len(bits)
    low, high = wilson_interval(int(bits.sum()), seen)
    values = {"top1": 100 * float(bits.mean()), "gmacs": gmacs, "params_m": 22.0, **more}
    return TrialResult(
        n, state, RecordedRecipe.of(recipe), f"k{n}", values, RecordedRecipe.of(recipe), seen,  # type: ignore[arg-type]
        pack_bits(bits), low, high, 1.0,
    )  # fmt: skip
