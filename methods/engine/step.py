"""One step of a recipe: a method and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_registry import get


@dataclass(frozen=True)
class Step:
    """A method and its parameters, not checked against a model yet."""

    method: str
    params: dict[str, Any]

    @property
    def declared(self) -> Method:
        """The registered method. Raises BadInput if there is none of this name."""
        return get(self.method)

    def plain(self) -> dict[str, Any]:
        """A dict for YAML and JSON: tuples become lists, None is left out."""
        out: dict[str, Any] = {"method": self.method}
        for name, value in self.params.items():
            if value is not None:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


def short(value: Any) -> str:
    """The value as text for one line of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(short(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return " ".join(f"{k}={short(v)}" for k, v in value.items() if v is not None)
    return str(value)
