"""A pool of measured recipes, so that every arm of a comparison can be replayed for nothing.

Presets, random recipes and those of a few TPE searches, each measured once on every search image by
the search's own `measure_recipe`: correctness image by image, and the cost. A proposal of an arm
stands for the recipe of the pool that is nearest to it in the search space (1-nearest-neighbour,
the same methods, choices scaled to their ranges), so that arms never see anything but real
measurements."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from vitpareto.methods import BadInput, Recipe
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.results import unpack_bits
from vitpareto.search.study.samplers import make_sampler
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

#: how much further a choice is that one of two recipes does not have, or has another of
OTHER = 1.0


@dataclass(frozen=True, eq=False)
class Pool:
    """right [N, M]: correctness; gmacs [N]; params: Optuna parameters of each. The first is the
    dense model, which has none.
    """

    right: np.ndarray
    gmacs: np.ndarray
    params: list[dict[str, Any]]

    @property
    def images(self) -> int:
        return self.right.shape[1]

    @classmethod
    def load(cls, path: Path) -> Pool:
        kept = np.load(path)
        params = json.loads(bytes(kept["params"]).decode())
        bits = np.unpackbits(kept["right"], axis=1, count=int(kept["images"])).astype(bool)
        return cls(bits, kept["gmacs"], params)

    def save(self, path: Path) -> None:
        packed = np.frombuffer(json.dumps(self.params).encode(), dtype=np.uint8)
        np.savez_compressed(
            path, right=np.packbits(self.right, axis=1), images=self.images, gmacs=self.gmacs,
            params=packed,
        )  # fmt: skip

    def shuffled(self, seed: int) -> Pool:
        """The images in another order, as another seed of a study has them."""
        order = np.random.default_rng(seed).permutation(self.images)
        return Pool(self.right[:, order], self.gmacs, self.params)


class Nearest:
    """Finds the pool's recipe for a proposal."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.ranges: dict[str, float] = {}
        for name in {n for p in pool.params for n in p}:
            found = [p[name] for p in pool.params if _number(p.get(name))]
            self.ranges[name] = (max(found) - min(found)) or 1.0 if found else 1.0
        self.groups: dict[tuple[str, str], list[int]] = {}
        for at, params in enumerate(pool.params[1:], start=1):
            self.groups.setdefault(_group(params), []).append(at)

    def __call__(self, params: Mapping[str, Any]) -> int:
        """The recipe's place in the pool. LookupError where the pool has none of its methods."""
        if not params:
            return 0
        group = self.groups.get(_group(params))
        if group is None:
            raise LookupError(f"the pool has no recipe of {_group(params)}")
        return min(group, key=lambda at: (self._apart(params, self.pool.params[at]), at))

    def _apart(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        total = 0.0
        for name in one.keys() | other.keys():
            a, b = one.get(name), other.get(name)
            if _number(a) and _number(b):
                total += abs(a - b) / self.ranges[name]  # type: ignore[operator]
            elif a != b:
                total += OTHER
        return total


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _group(params: Mapping[str, Any]) -> tuple[str, str]:
    return str(params.get("method")), str(params.get("structure"))


def build(config: SearchConfig, random: int, tpe: int, workers: int = 2) -> Pool:
    """Measure: the presets and `random` recipes of each worker, and a TPE search of `tpe`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as crew:
        parts = list(
            crew.map(_measured, [config] * workers, range(workers), [random] * workers,
                     [tpe] * workers)
        )  # fmt: skip
    together: dict[str, tuple[np.ndarray, float, dict[str, Any]]] = {}
    for part in parts:
        for key, found in part.items():
            together.setdefault(key, found)
    right, gmacs, params = zip(*together.values(), strict=True)
    return Pool(np.stack(right), np.array(gmacs), list(params))


def _measured(
    config: SearchConfig, seed: int, random: int, tpe: int
) -> dict[str, tuple[np.ndarray, float, dict[str, Any]]]:
    """One worker's recipes by candidate: correctness, GMACs, Optuna parameters."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, tuple[np.ndarray, float, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = check_job(SearchConfig.of({**config.plain(), "store": scratch}))
        place = Worker.open(study_task(prepared, threads=1))
        dense = measure_recipe(place, 0, Recipe())
        found[dense.key] = (unpack_bits(dense.bits, dense.images), dense.values["gmacs"], {})
        presets = [p for _, p in prepared.space.preset_params()]
        for kind, many in (("random", random), ("tpe", tpe)):
            study = optuna.create_study(
                directions=["maximize", "minimize"], sampler=make_sampler(kind, seed)
            )
            for params in presets if kind == "tpe" or seed == 0 else []:
                study.enqueue_trial(params)
            end = len(found) + many
            for _ in range(4 * many):
                if len(found) >= end:
                    break
                asked = study.ask()
                try:
                    recipe = prepared.space.suggest(asked, prepared.model.reshape)
                    key = recipe.key(prepared.model.reshape(recipe))
                except BadInput:
                    study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                    continue
                if key not in found:
                    one = measure_recipe(place, len(found), recipe)
                    found[key] = (
                        unpack_bits(one.bits, one.images), one.values["gmacs"], dict(asked.params),
                    )  # fmt: skip
                right, gmacs, _ = found[key]
                study.tell(asked, [100 * float(right.mean()), gmacs])
    return found
