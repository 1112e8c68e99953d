"""Optuna's samplers by the names that a job uses. May import optuna."""

from __future__ import annotations

import optuna

from vitpareto.search.study.optuna_adapter import GroupTPE


def make_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of this name.

    Args:
        kind: one of `choices.SAMPLERS`.
        seed: of its random numbers; after a restart the caller gives another one.
    """
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return GroupTPE(seed)
