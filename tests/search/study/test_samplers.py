"""TPE by groups draws what Optuna's draws, and only the groups that a proposal uses."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import optuna
import pytest

from vitpareto.search.study.optuna_adapter import GroupTPE


def optunas(seed: int) -> optuna.samplers.TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=seed
        )


def run(sampler: optuna.samplers.BaseSampler, conditional: bool, trials: int) -> list[Any]:
    """What is proposed, with two trials in flight at a time."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    proposed, flying = [], []
    for _ in range(trials):
        trial = study.ask()
        method = trial.suggest_categorical("method", ["a", "b", "c"])
        name = f"{method}.x" if conditional else "x"
        x = trial.suggest_float(name, 0.0, 1.0)
        y = trial.suggest_int(f"{method}.y" if conditional else "y", 1, 9)
        proposed.append((method, x, y))
        flying.append((trial, [x * (1 + (method == "b")), x + y / 9]))
        if len(flying) == 2:
            study.tell(*flying.pop(0))
    return proposed


def test_on_a_space_of_one_group_it_is_optunas() -> None:
    assert run(GroupTPE(3), False, 40) == run(optunas(3), False, 40)


def test_only_the_groups_of_a_proposal_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, ...]] = []
    whole = GroupTPE._sample

    def watched(self: Any, study: Any, trial: Any, space: dict[str, Any]) -> Any:
        drawn.append(tuple(space))
        return whole(self, study, trial, space)

    monkeypatch.setattr(GroupTPE, "_sample", watched)
    proposed = run(GroupTPE(0), True, 60)
    method, x, _ = proposed[-1]
    # the choice of a method, and that method's two together: nothing of the others
    assert drawn[-2:] == [("method",), (f"{method}.x", f"{method}.y")], drawn[-4:]
    assert len(drawn) <= 2 * 60 and 0 <= x <= 1


def test_it_finds_what_optunas_finds_on_a_conditional_space() -> None:
    """Both samplers propose the better method more often than a uniform choice."""
    shares = {
        kind: np.mean([
            method == "b" for seed in range(4) for method, *_ in run(make(seed), True, 80)[30:]
        ])
        for kind, make in (("ours", GroupTPE), ("optuna", optunas))
    }  # fmt: skip
    assert all(share > 0.4 for share in shares.values()), shares
    assert abs(shares["ours"] - shares["optuna"]) < 0.2, shares
