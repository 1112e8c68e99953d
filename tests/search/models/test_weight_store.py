"""Trained weights by digest: written atomically and once, read back bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.refusals import refused
from tests.search.small import vit
from vitpareto.methods import Code, Recipe
from vitpareto.methods.engine.weights import weights_digest
from vitpareto.search.errors import UserError
from vitpareto.search.models.weight_store import WeightStore


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {k: v.clone() for k, v in vit().state_dict().items()}


def test_weights_are_read_back_bit_for_bit(tmp_path: Path, state: dict[str, Tensor]) -> None:
    store = WeightStore(tmp_path / "weights")
    digest = store.save(state)
    assert digest == weights_digest(state) and store.has(digest)
    read = store.load(digest)
    assert set(read) == set(state) and all(torch.equal(read[k], state[k]) for k in state)
    built = Recipe(weights=digest).build(vit(), weights=read)
    assert weights_digest(built.state_dict()) == digest


def test_the_same_weights_are_written_once(tmp_path: Path, state: dict[str, Tensor]) -> None:
    store = WeightStore(tmp_path / "weights")
    path = store.path(store.save(state))
    before = path.stat()
    store.save(dict(reversed(state.items())))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat() == before
    state["norm.weight"][0] += 1
    assert store.save(state) != path.stem and len(list(path.parent.iterdir())) == 2


def test_views_and_shared_memory_are_saved_as_separate_tensors(tmp_path: Path) -> None:
    store, whole = WeightStore(tmp_path), torch.arange(12.0).view(3, 4)
    state = {"a": whole, "b": whole, "row": whole[1], "across": whole.T}
    read = store.load(store.save(state))
    assert all(torch.equal(read[k], v) for k, v in state.items())


def test_another_store_adopts_the_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    one, other = WeightStore(tmp_path / "a"), WeightStore(tmp_path / "b" / "weights")
    digest = one.save(state)
    other.adopt(digest, one)
    other.adopt(digest, one)
    assert other.path(digest).samefile(one.path(digest)), "one file under two names"
    with refused(Code.NOT_FOUND, UserError, digest="0" * 16, path=str(one.path("0" * 16))):
        other.adopt("0" * 16, one)
    assert [p.name for p in other.folder.iterdir()] == [f"{digest}.safetensors"]


def test_missing_and_truncated_files_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    store = WeightStore(tmp_path / "weights")
    with refused(Code.NOT_FOUND, UserError, digest="0" * 16):
        store.load("0" * 16)
    path = store.path(store.save(state))
    path.write_bytes(path.read_bytes()[:-100])
    with refused(Code.UNREADABLE, UserError, path=str(path)):
        store.load(path.stem)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    store = WeightStore(tmp_path / "weights")
    store.path(weights_digest(state)).mkdir(parents=True)  # a folder where the file has to go
    with pytest.raises(OSError):
        store.save(state)
    assert [p.suffix for p in store.folder.iterdir()] == [".safetensors"]
