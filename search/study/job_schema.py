"""The JSON Schema of a job file and the table of job keys, from their declarations."""

from __future__ import annotations

from typing import Any

from vitpareto import methods
from vitpareto.search.study.job_keys import KEYS
from vitpareto.search.study.key_declarations import Key
from vitpareto.search.study.key_kinds import Entries, Integer, Number

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def job_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a job file.

    It checks each key by itself; rules between keys are checked when a job is read.
    """
    names = methods.names()
    entries = {
        f"{n}.{p.name}": {"description": f"{n}: {p.accepts}"}
        for n in names
        for p in methods.get(n).space
    }
    entries["structure"] = {"description": "structural methods beneath a token method, or none"}
    properties = {}
    for key in KEYS.values():
        value = key.kind.schema()
        if key.name == "methods":
            value["anyOf"][0]["items"] = {"enum": list(names)}
        if isinstance(key.kind, Entries):
            value |= {"properties": entries, "additionalProperties": False}
        properties[key.name] = _property(key, value)
    return {
        "$schema": DIALECT,
        "title": "vitpareto search job",
        "description": "The job file of `vitpareto search` and `vitpareto submit`.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _property(key: Key, value: dict[str, Any]) -> dict[str, Any]:
    # a key that is null counts as not given
    if "enum" in value:
        value = {**value, "enum": [*value["enum"], None]}
    elif "anyOf" in value:
        value = {"anyOf": [*value["anyOf"], {"type": "null"}]}
    else:
        value = {**value, "type": [value["type"], "null"]}
    out = {"description": f"{key.help}. Default: {key.shown_default}.", **value}
    if key.default not in (None, "", (), {}):
        out["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    return out


def markdown_table() -> str:
    """Return the table of job keys as search/README.md holds it."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key in KEYS.values():
        meaning = f"{key.help}; {key.kind.rule}" if _bounded(key) else key.help
        lines.append(f"| `{key.name}` | {key.shown_default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _bounded(key: Key) -> bool:
    return isinstance(key.kind, (Integer, Number))
