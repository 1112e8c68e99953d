"""The cache of preparations: found again, shared by processes, resumed, never half done."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch

from tests.search.faults import until
from vitpareto.methods.engine.preparation import SharedWeights
from vitpareto.methods.engine.weights import weights_digest
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.training.preparation_cache import epochs_key, key_of, prepare_once

WHAT = {"model": "m", "settings": {"epochs": 2, "lr": 0.1}}


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(8, generator=torch.Generator().manual_seed(seed))}


class Work:
    """A preparation in steps that are stored; interrupted before the step `killed_at`.

    awaits: a file without which no step ends.
    """

    def __init__(self, steps: int = 3, killed_at: int | None = None, awaits: Path | None = None):
        self.steps, self.killed_at, self.awaits = steps, killed_at, awaits
        self.done: list[int] = []

    def __call__(self, progress: Path, artifacts: WeightStore) -> SharedWeights:
        for step in range(self.steps):
            kept = progress / f"{step}"
            if kept.exists():
                continue
            if step == self.killed_at:
                raise KeyboardInterrupt
            if self.awaits is not None:
                until(self.awaits.exists, "the other process waits", 200)
            kept.touch()
            self.done.append(step)
        return SharedWeights(artifacts.save(weights(0)), 0.5)


def test_a_finished_preparation_is_found(tmp_path: Path) -> None:
    first, second = Work(), Work()
    made = prepare_once(tmp_path, "tnt", WHAT, first)
    assert made.fresh and first.done == [0, 1, 2]
    found = prepare_once(tmp_path, "tnt", WHAT, second)
    assert not found.fresh and second.done == []
    assert (found.key, found.outcome) == (made.key, made.outcome)
    assert found.artifacts.load(found.outcome.weights)["w"].equal(weights(0)["w"])
    assert made.outcome.weights == weights_digest(weights(0))
    kept = {p.name for p in made.folder.iterdir()}
    assert kept == {"done.json", "lock", "weights", "what.json"}
    assert json.loads((made.folder / "what.json").read_text())["settings"] == WHAT["settings"]


def test_other_inputs_have_another_key(tmp_path: Path) -> None:
    keys = {key_of(w) for w in (
        WHAT, {**WHAT, "model": "n"}, {**WHAT, "settings": {"epochs": 3, "lr": 0.1}}, {},
    )}  # fmt: skip
    assert len(keys) == 4
    assert key_of(dict(reversed(WHAT.items()))) == key_of(WHAT)
    made = [prepare_once(tmp_path, name, WHAT, Work()) for name in ("tnt", "patchmerger")]
    assert all(m.fresh for m in made) and made[0].key != made[1].key


def test_an_interrupted_preparation_continues(tmp_path: Path) -> None:
    first, second = Work(killed_at=2), Work()
    with pytest.raises(KeyboardInterrupt):
        prepare_once(tmp_path, "tnt", WHAT, first)
    assert not list(tmp_path.glob(".prepared/*/done.json"))
    made = prepare_once(tmp_path, "tnt", WHAT, second)
    assert (first.done, second.done) == ([0, 1], [2]) and made.fresh
    assert not (made.folder / "progress").exists()


class Waiting(logging.Handler):
    """Creates a file once a lock is held by another process."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        self.file.touch()


def _prepare_in_process(store: Path, out: Path) -> None:
    waiting = out.parent / "waiting"
    locks = logging.getLogger("vitpareto.search.files.locks")
    locks.setLevel(logging.INFO)
    locks.addHandler(Waiting(waiting))
    work = Work(awaits=waiting)
    made = prepare_once(store, "tnt", WHAT, work)
    out.write_text(json.dumps([made.fresh, made.outcome.weights, work.done]))


def test_one_of_two_processes_prepares_and_the_other_waits(tmp_path: Path) -> None:
    """One prepares until the other waits for it; the other then finds the outcome."""
    spawn = multiprocessing.get_context("spawn")
    outs = [tmp_path / f"{i}.json" for i in range(2)]
    processes = [
        spawn.Process(target=_prepare_in_process, args=(tmp_path / "store", out)) for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        assert process.exitcode == 0
    results = sorted(json.loads(out.read_text()) for out in outs)
    assert [fresh for fresh, _, _ in results] == [False, True]
    assert results[0][1] == results[1][1]
    assert [done for _, _, done in results] == [[], [0, 1, 2]]


def test_the_key_that_gives_a_method_epochs() -> None:
    assert {n: epochs_key(n) for n in ("topk", "rajni", "resize", "dense")} == {
        "topk": None, "rajni": None, "resize": None, "dense": None,
    }  # fmt: skip
    assert epochs_key("tnt") == epochs_key("nvit") == "prepare_epochs"
    assert {epochs_key(n) for n in ("patchmerger", "dynamicvit", "revit")} == {"train_epochs"}
