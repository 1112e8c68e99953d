"""Typed parameters with bounds, defaults and conditions.

`Method.parameters` are what a recipe holds, in absolute units (block indices, token counts).
`Method.space` is what a search chooses, relative to depth and patch count, so that a setting
carries over to other models. This module knows nothing of Optuna; `search.study.space` translates.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vitpareto.methods.engine.bad_input import BadInput, Code, closest, suggestion


class Required:
    """The type of `REQUIRED`, the default of a parameter that must be given."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True)
class Parameter:
    """Base class of all parameters.

    Args:
        name: the key in a recipe.
        doc: one line of help.
        default: the value if none is given; `REQUIRED` if one must be given.
        when: `("other", (values, …))` searches this parameter only if `other` has one of the
            values.
    """

    name: str
    doc: str = ""
    default: Any = REQUIRED
    when: tuple[str, tuple[Any, ...]] | None = None

    @property
    def accepts(self) -> str:
        """The accepted values as a noun phrase: "an integer >= 1". Bounds are exact."""
        raise NotImplementedError

    @property
    def accepts_rounded(self) -> str:
        """`accepts` for a table, with bounds rounded to 3 significant digits."""
        return self.accepts

    def check(self, value: Any, where: str) -> Any:
        """The value in its canonical type. Raises BadInput if it is not accepted.

        where: the method or section that the parameter belongs to, for the message.
        """
        raise NotImplementedError

    def error(self, code: Code, value: Any, where: str, hint: str = "", **details: Any) -> BadInput:
        """The error for a value that is not accepted; `details` are further ones of it."""
        return BadInput(
            f"{where}.{self.name} must be {self.accepts} (got {value!r}){hint}",
            code,
            name=self.name,
            where=where,
            got=value,
            accepted=self.accepts,
            **details,
        )


def _is_real(value: Any) -> bool:
    """Whether the value is a finite number of any library (NumPy's too) and not a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return _is_real(value) and float(value).is_integer()


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _interval(kind: str, low: float, high: float, open_low: bool = False, digits: int = 12) -> str:
    """The accepted numbers: "a number in (0, 1]", "an integer >= 0". digits: significant ones."""
    if math.isinf(low) and math.isinf(high):
        return f"a finite {kind.split()[-1]}"
    if math.isinf(low):
        return f"{kind} <= {high:g}"
    if math.isinf(high):
        return f"{kind} {'>' if open_low else '>='} {low:g}"
    return f"{kind} in {'(' if open_low else '['}{low:.{digits}g}, {high:.{digits}g}]"


@dataclass(frozen=True)
class Float(Parameter):
    """A real number, low <= value <= high.

    Args:
        log: search on a logarithmic scale.
        open_low: exclude `low` itself.
    """

    low: float = -math.inf
    high: float = math.inf
    log: bool = False
    open_low: bool = False

    @property
    def accepts(self) -> str:
        return _interval("a number", self.low, self.high, self.open_low)

    @property
    def accepts_rounded(self) -> str:
        return _interval("a number", self.low, self.high, self.open_low, digits=3)

    def check(self, value: Any, where: str) -> float | None:
        if value is None and self.default is None:
            return None
        if not _is_real(value):
            raise self.error(Code.WRONG_TYPE, value, where)
        below = value <= self.low if self.open_low else value < self.low
        if below or value > self.high:
            raise self.error(Code.OUT_OF_RANGE, value, where)
        return float(value)


#: the default upper bound of `Int`: no bound in practice
UNBOUNDED = 2**31


@dataclass(frozen=True)
class Int(Parameter):
    """An integer, low <= value <= high."""

    low: int = 0
    high: int = UNBOUNDED
    log: bool = False

    @property
    def accepts(self) -> str:
        return _interval("an integer", self.low, math.inf if self.high == UNBOUNDED else self.high)

    def check(self, value: Any, where: str) -> int:
        if not _is_integer(value):
            raise self.error(Code.WRONG_TYPE, value, where)
        if not self.low <= value <= self.high:
            raise self.error(Code.OUT_OF_RANGE, value, where)
        return int(value)


@dataclass(frozen=True)
class Choice(Parameter):
    """One of a few values."""

    choices: tuple[Any, ...] = ()

    @property
    def accepts(self) -> str:
        return f"one of {', '.join(repr(c) for c in self.choices)}"

    def check(self, value: Any, where: str) -> Any:
        for choice in self.choices:
            if type(choice) is type(value) and choice == value:
                return choice
        strings = [c for c in self.choices if isinstance(c, str)]
        if isinstance(value, str):
            hint, match = suggestion(value, strings), closest(value, strings)
            raise self.error(Code.OUT_OF_RANGE, value, where, hint, closest=match)
        raise self.error(Code.OUT_OF_RANGE, value, where)


@dataclass(frozen=True)
class Layers(Parameter):
    """Indices of the blocks at which a method reduces: increasing, from 0 to depth - 1.

    The empty list means no block.
    """

    @property
    def accepts(self) -> str:
        return "a list of increasing block indices, starting at 0"

    def check(self, value: Any, where: str) -> tuple[int, ...] | None:
        if value is None and self.default is None:
            return None
        if not _is_list(value) or not all(_is_integer(v) for v in value):
            raise self.error(Code.WRONG_TYPE, value, where)
        layers = tuple(int(v) for v in value)
        falls = any(b <= a for a, b in zip(layers, layers[1:], strict=False))
        if falls or any(v < 0 for v in layers):
            raise self.error(Code.OUT_OF_RANGE, value, where)
        return layers


@dataclass(frozen=True)
class Counts(Parameter):
    """Patches left after each block, prefix tokens excluded: one per block, never increasing."""

    default: Any = None

    @property
    def accepts(self) -> str:
        return "a list of the patches left after each block: integers >= 1, never increasing"

    def check(self, value: Any, where: str) -> tuple[int, ...] | None:
        if value is None:
            return None
        if not _is_list(value) or not value or not all(_is_integer(v) for v in value):
            raise self.error(Code.WRONG_TYPE, value, where)
        counts = tuple(int(v) for v in value)
        grows = any(b > a for a, b in zip(counts, counts[1:], strict=False))
        if grows or any(v < 1 for v in counts):
            raise self.error(Code.OUT_OF_RANGE, value, where)
        return counts


@dataclass(frozen=True)
class Rates(Parameter):
    """Fractions of the patches, one per prune layer, 0 < rate <= 1."""

    @property
    def accepts(self) -> str:
        return "a list of fractions in (0, 1], one per prune layer"

    def check(self, value: Any, where: str) -> tuple[float, ...]:
        if not _is_list(value) or not all(_is_real(v) for v in value):
            raise self.error(Code.WRONG_TYPE, value, where)
        if not all(0 < v <= 1 for v in value):
            raise self.error(Code.OUT_OF_RANGE, value, where)
        return tuple(float(v) for v in value)


@dataclass(frozen=True)
class IntOrList(Parameter):
    """An integer >= low for every block (or other unit `each`), or a list with one per unit."""

    low: int = 0
    each: str = "block"

    @property
    def accepts(self) -> str:
        return f"an integer >= {self.low}, or a list with one per {self.each}"

    def check(self, value: Any, where: str) -> int | tuple[int, ...]:
        values = value if _is_list(value) else [value]
        if not values or not all(_is_integer(v) for v in values):
            raise self.error(Code.WRONG_TYPE, value, where)
        if any(v < self.low for v in values):
            raise self.error(Code.OUT_OF_RANGE, value, where)
        return tuple(int(v) for v in value) if _is_list(value) else int(value)


def check_values(
    declared: Sequence[Parameter], given: dict[str, Any], where: str, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """All declared parameters with checked values and defaults filled in, in declared order.

    Args:
        where: the method or section that they belong to, for messages.
        optional: names that may be missing although they have no default; they stay out.

    Raises:
        BadInput: for an unknown name, a missing parameter or a value that is not accepted.
    """
    names = [p.name for p in declared]
    for name in given:
        if name not in names:
            raise BadInput.unknown(
                f"{where} has no parameter {name!r}",
                name,
                names,
                name=name,
                where=where,
                accepted=names,
            )
    out: dict[str, Any] = {}
    skip = set(optional)
    for p in declared:
        if p.name in given:
            out[p.name] = p.check(given[p.name], where)
        elif not isinstance(p.default, Required):
            out[p.name] = p.default
        elif p.name not in skip:
            raise BadInput(
                f"{where}.{p.name} must be given: {p.accepts}",
                Code.MISSING,
                name=p.name,
                where=where,
                accepted=p.accepts,
            )
    return out
