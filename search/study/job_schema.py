"""The JSON Schema of a job file and the table of job keys, from their declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitpareto.search.study.job_keys import KEYS, Key
from vitpareto.search.study.key_kinds import Entries

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(
    methods: Sequence[str] = (), parameters: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a job file.

    It holds each key by itself; rules between keys are checked when the job is read.

    Args:
        methods: names that `methods` may list; none: any.
        parameters: the entries of `space` and `fixed` (METHOD.PARAMETER) and what each accepts;
            none: any.
    """
    properties = {}
    for key in KEYS.values():
        value = key.kind.schema()
        if key.name == "methods" and methods:
            value["anyOf"][0]["items"] = {"enum": list(methods)}
        if isinstance(key.kind, Entries) and parameters:
            value["properties"] = {n: {"description": text} for n, text in parameters.items()}
            value["additionalProperties"] = False
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
    out = {"description": f"{_sentence(key.help)} Default: {key.shown_default}.", **value}
    if key.default not in (None, "", (), {}):
        out["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
    return out


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def markdown_table() -> str:
    """Return the table of job keys as search/README.md holds it."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key in KEYS.values():
        meaning = f"{key.help} ({key.kind.rule})" if _bounded(key) else key.help
        lines.append(f"| `{key.name}` | {key.shown_default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _bounded(key: Key) -> bool:
    """Whether the rule says more than the key's own words."""
    return "from" in key.kind.rule or "above" in key.kind.rule
