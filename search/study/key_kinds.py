"""The kinds of job keys: which values a key accepts, their canonical form and their JSON Schema.

Standard library only, so that the command can declare its options from job keys at once.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRONG_TYPE, OUT_OF_RANGE = "wrong-type", "out-of-range"


class Rejected(ValueError):
    """A value that a key does not accept.

    Attributes:
        code: WRONG_TYPE or OUT_OF_RANGE.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True)
class Kind:
    """Which values a key accepts.

    `rule` completes "must be ..."; `python` is the type that the command line parses to.
    """

    python: type = str

    @property
    def rule(self) -> str:
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """Return the value in its canonical type. Raises Rejected."""
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema (2020-12) of the accepted values."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Kind):
    """A string, and its `pattern` in full where there is one. `form` describes the pattern."""

    pattern: str = ""
    form: str = "a string"

    @property
    def rule(self) -> str:
        return self.form

    def check(self, value: Any) -> str:
        if not isinstance(value, (str, Path)):
            raise Rejected(WRONG_TYPE)
        if self.pattern and not re.fullmatch(self.pattern, str(value)):
            raise Rejected(OUT_OF_RANGE)
        return str(value)

    def schema(self) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "string"}
        return {**out, "pattern": f"^(?:{self.pattern})$"} if self.pattern else out


@dataclass(frozen=True)
class Integer(Kind):
    """An integer, low <= value <= high. Accepts 1e3; rejects booleans."""

    python: type = int
    low: int = 0
    high: int = 2**31 - 1

    @property
    def rule(self) -> str:
        return f"an integer from {self.low} to {self.high}"

    def check(self, value: Any) -> int:
        if not _finite(value) or not float(value).is_integer():
            raise Rejected(WRONG_TYPE)
        if not self.low <= value <= self.high:
            raise Rejected(OUT_OF_RANGE)
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, low <= value <= high; `open_low`: low < value."""

    python: type = float
    low: float = 0.0
    high: float = 1e9
    open_low: bool = False

    @property
    def rule(self) -> str:
        if self.open_low:
            return f"a number above {self.low:g} and at most {self.high:g}"
        return f"a number from {self.low:g} to {self.high:g}"

    def check(self, value: Any) -> float:
        if not _finite(value):
            raise Rejected(WRONG_TYPE)
        below = value <= self.low if self.open_low else value < self.low
        if below or value > self.high:
            raise Rejected(OUT_OF_RANGE)
        return float(value)

    def schema(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.open_low else "minimum"
        return {"type": "number", low: self.low, "maximum": self.high}


@dataclass(frozen=True)
class OneOf(Kind):
    """One of a few words. YAML 1.1 reads a bare `off` as false and `on` as true: both are
    accepted as words if they are choices.
    """

    choices: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def check(self, value: Any) -> str:
        word = self._booleans().get(value) if isinstance(value, bool) else value
        if not isinstance(word, str):
            raise Rejected(WRONG_TYPE)
        if word not in self.choices:
            raise Rejected(OUT_OF_RANGE)
        return word

    def _booleans(self) -> dict[bool, str]:
        return {b: w for b, w in ((False, "off"), (True, "on")) if w in self.choices}

    def schema(self) -> dict[str, Any]:
        return {"enum": [*self.choices, *self._booleans()]}


@dataclass(frozen=True)
class Names(Kind):
    """A list of names, also as one string separated by commas."""

    #: names that the schema suggests and requires in a list; (): any
    known: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        return "a list of names"

    def check(self, value: Any) -> tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) for i in items):
            raise Rejected(WRONG_TYPE)
        return tuple(i.strip() for i in items if i.strip())

    def schema(self) -> dict[str, Any]:
        item: dict[str, Any] = {"enum": list(self.known)} if self.known else {"type": "string"}
        return {"anyOf": [{"type": "array", "items": item, "uniqueItems": True},
                          {"type": "string"}]}  # fmt: skip


@dataclass(frozen=True)
class Entries(Kind):
    """A mapping from METHOD.PARAMETER; what it may hold is checked against the methods."""

    python: type = dict

    @property
    def rule(self) -> str:
        return "a mapping from METHOD.PARAMETER"

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise Rejected(WRONG_TYPE)
        return {str(k): v for k, v in value.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


def _finite(value: Any) -> bool:
    """A finite number of any library (NumPy's too) that is not a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)
