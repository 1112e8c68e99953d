"""The JSON Schema of a job file agrees with what a search accepts; the README has its table."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.command_line import Run
from tests.search.study.test_job import BAD_VALUES, GOOD
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.job_keys import KEYS
from vitpareto.search.study.key_kinds import Entries

#: rules of a name that the schema leaves to the search
NOT_IN_THE_SCHEMA = {"name"}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    from vitpareto.search.study.job_schema import job_schema

    schema = job_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_the_command_prints_the_schema_of_every_key(command: Run) -> None:
    result = command("schema")
    schema = json.loads(result.out)
    assert result.code == 0 and schema["$schema"].endswith("2020-12/schema")
    assert list(schema["properties"]) == [f.name for f in fields(SearchConfig)]
    assert all(p["description"] for p in schema["properties"].values())


@pytest.mark.parametrize(
    "job",
    [
        GOOD,
        {},
        {"methods": "topk, tome", "trials": 1000.0},
        {"latency": False, "race": True, "weights": None},
        {"time": "1.5h", "device": "cuda", "space": {"structure": ["none"]}},
    ],
)
def test_good_jobs_are_valid(validator: Draft202012Validator, job: dict[str, Any]) -> None:
    SearchConfig.of(job)
    validator.validate(job)


def test_a_completed_job_is_valid(validator: Draft202012Validator) -> None:
    validator.validate(json.loads(json.dumps(SearchConfig.of({}).plain())))


@pytest.mark.parametrize(
    ("key", "value"),
    [(k, v) for k, v, _ in BAD_VALUES if (k not in NOT_IN_THE_SCHEMA or v == 12)
     and v != float("inf")],  # JSON has no infinity
    ids=str,
)  # fmt: skip
def test_bad_values_are_not_valid(validator: Draft202012Validator, key: str, value: Any) -> None:
    assert not validator.is_valid({key: value})


@pytest.mark.parametrize(
    "job",
    [
        {"modell": "x"},
        {"methods": ["tomee"]},
        {"space": {"topk.keep_rat": [0.5, 0.9]}},
        {"methods": ["tome", "tome"]},
    ],
)
def test_unknown_names_are_not_valid(validator: Draft202012Validator, job: dict) -> None:
    assert not validator.is_valid(job)


def test_the_readme_holds_the_table_of_job_keys(command: Run) -> None:
    """Mend it with `vitpareto schema --markdown`."""
    readme = Path(__file__).parents[3] / "search" / "README.md"
    table = command("schema", "--markdown").out
    assert table.count("\n") == len(KEYS) + 2
    assert table in readme.read_text(encoding="utf-8")


def test_every_key_has_an_option_with_its_help(command: Run) -> None:
    text = " ".join(command("search", "--help").out.split())
    for key in KEYS.values():
        if not isinstance(key.kind, Entries):
            assert key.option in text, key.name
            assert " ".join(key.help.split()[:3]) in text, key.name
