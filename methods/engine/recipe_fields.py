"""The fields of a recipe from plain values, as parsed YAML or JSON gives them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.method_registry import get
from vitpareto.methods.engine.step import Step

#: the keys of a recipe
KEYS = ("structure", "tokens", "weights")

#: the form of `weights_digest`
DIGEST = re.compile(r"[0-9a-f]{16}\Z")


def parse_recipe(data: Any) -> dict[str, Any]:
    """The fields of a `Recipe` from plain values; None is the empty recipe. Raises BadInput."""
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise BadInput(
            f"recipe must be a mapping with structure and tokens (got {data!r})",
            Code.WRONG_TYPE,
            name="recipe",
            got=type(data).__name__,
        )
    fields: dict[str, Any] = {}
    for key, value in data.items():
        if key not in KEYS:
            raise BadInput.unknown(
                f"recipe has no key {key!r}",
                key,
                KEYS,
                name=key,
                where="recipe",
                accepted=list(KEYS),
            )
        if value is not None:
            fields[key] = _digest(value) if key == "weights" else _step(key, value)
    return fields


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not DIGEST.match(value):
        raise BadInput(
            f"recipe.weights must be the digest of a state dict, 16 hex digits (got {value!r})",
            Code.WRONG_TYPE,
            name="weights",
            where="recipe",
            got=value,
        )
    return value


def _step(kind: str, value: Any) -> Step | None:
    """The step of a recipe's structure or tokens; None for the reference "dense"."""
    if not isinstance(value, Mapping) or "method" not in value:
        raise BadInput(
            f"recipe.{kind} must be a mapping with a method and its parameters (got {value!r})",
            Code.WRONG_TYPE,
            name=kind,
            where="recipe",
            got=type(value).__name__,
        )
    declared = get(str(value["method"]))
    if declared.is_reference:
        return None
    if declared.kind != kind:
        raise BadInput(
            f"recipe.{kind} must be a {kind} method (got {declared.name}, a {declared.kind} "
            "method)",
            Code.CONFLICT,
            name=kind,
            where="recipe",
            got=declared.name,
        )
    return Step(declared.name, declared.check({k: v for k, v in value.items() if k != "method"}))
