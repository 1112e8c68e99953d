"""The provenance of a result: its JSON on disk is that of version 0.1."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.results import TrialResult
from vitpareto.search.training.preparation_cache import PreparationUse

RECORDED = Path(__file__).parents[2] / "fixtures" / "version_0_1.tar.xz"


@pytest.fixture(scope="module")
def recorded() -> dict[str, str]:
    """The recorded result files of version 0.1, by name."""
    found = {}
    with tarfile.open(RECORDED) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parent.name in ("trials", "certified") and path.stem.isdigit():
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read().decode()
    return found


def test_results_of_version_0_1_are_written_back_byte_for_byte(recorded: dict[str, str]) -> None:
    assert len(recorded) == 16
    for text in recorded.values():
        assert json.dumps(TrialResult.from_json(json.loads(text)).to_json()) == text


def test_recorded_values_have_names(recorded: dict[str, str]) -> None:
    results = [TrialResult.from_json(json.loads(text)) for text in recorded.values()]
    provenances = [r.provenance for r in results]
    assert {p.extra == {} for p in provenances} == {True}
    assert {p.dtype for p in provenances} == {"float32"} and {p.seed for p in provenances} == {3}
    assert {p.split for p in provenances} == {None, "held-out"}
    assert {use.method for p in provenances for use in p.prepared or ()} == {"nvit", "tnt"}
    assert {p.training.settings.epochs for p in provenances if p.training is not None} == {1}


def test_unknown_keys_are_preserved() -> None:
    stored = {"seed": 0, "loss": 1.0, "hosts": ["a"]}
    provenance = Provenance.from_json(stored)
    assert provenance == Provenance(seed=0, extra={"loss": 1.0, "hosts": ["a"]})
    assert json.dumps(provenance.to_json()) == json.dumps(stored)


def test_an_empty_list_of_preparations_is_written_and_an_absent_one_is_not() -> None:
    assert Provenance(prepared=()).to_json() == {"prepared": []}
    assert Provenance.from_json({"prepared": []}) == Provenance(prepared=())
    assert Provenance().to_json() == {} and Provenance.from_json({}) == Provenance()


def test_an_update_replaces_the_values_that_it_has() -> None:
    use = PreparationUse("tnt", "k", fresh=True)
    before = Provenance(seed=0, device="cpu", batch=64, prepared=(use,), extra={"a": 1, "b": 1})
    after = before.updated(Provenance(batch=32, prepared=(), extra={"b": 2}))
    assert after == Provenance(seed=0, device="cpu", batch=32, prepared=(), extra={"a": 1, "b": 2})
