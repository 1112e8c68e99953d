"""Optuna's samplers, by the names that a job has for them."""

from __future__ import annotations

import warnings

import optuna

SAMPLERS = ("tpe", "nsga2", "random")


def make_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """One of SAMPLERS; the caller gives another seed after a restart."""
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    with warnings.catch_warnings():
        # `group` is what makes TPE work on conditional spaces; Optuna marks it experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=seed
        )
