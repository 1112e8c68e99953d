"""What a method can be told: typed parameters with bounds, defaults and conditions.

Two uses share these classes. `Method.parameters` are what a recipe holds (absolute: block indices,
token counts); `Method.space` are what a search chooses (relative to depth and patch count, so that
a finding carries over). Knows nothing of Optuna: `search.study.space` translates.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vitpareto.methods.engine.errors import BadInput, nearest


class Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True)
class Parameter:
    """Common to all. `when=("other", (values…))`: searched only if `other` has one of them."""

    name: str
    doc: str = ""
    default: Any = REQUIRED
    when: tuple[str, tuple[Any, ...]] | None = None

    @property
    def accepts(self) -> str:
        raise NotImplementedError

    def check(self, value: Any, where: str) -> Any:
        """The value in its canonical type; BadInput naming `where` if it is not acceptable."""
        raise NotImplementedError

    def reject(self, value: Any, where: str) -> BadInput:
        return BadInput(f"{where}.{self.name} is {value!r}: accepted is {self.accepts}")


def _real(value: Any) -> bool:
    """A finite number of any library (NumPy's too), not a bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    return math.isfinite(value)


def _whole(value: Any) -> bool:
    return _real(value) and float(value).is_integer()


@dataclass(frozen=True)
class Float(Parameter):
    """A real number, low <= value <= high (`open_low`: low < value). `log`: searched in logs."""

    low: float = -math.inf
    high: float = math.inf
    log: bool = False
    open_low: bool = False

    @property
    def accepts(self) -> str:
        least = "<" if self.open_low or math.isinf(self.low) else "<="
        most = "<" if math.isinf(self.high) else "<="
        return f"a number, {self.low:g} {least} {self.name} {most} {self.high:g}"

    def check(self, value: Any, where: str) -> float | None:
        if value is None and self.default is None:
            return None
        if not _real(value):
            raise self.reject(value, where)
        below = value <= self.low if self.open_low else value < self.low
        if below or value > self.high:
            raise self.reject(value, where)
        return float(value)


@dataclass(frozen=True)
class Int(Parameter):
    """A whole number, low <= value <= high."""

    low: int = 0
    high: int = 2**31
    log: bool = False

    @property
    def accepts(self) -> str:
        return f"a whole number, {self.low} <= {self.name} <= {self.high}"

    def check(self, value: Any, where: str) -> int:
        if not _whole(value) or not self.low <= value <= self.high:
            raise self.reject(value, where)
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
        if isinstance(value, str) and strings:
            raise BadInput(f"{where}.{self.name} is {value!r}{nearest(value, strings)}")
        raise self.reject(value, where)


@dataclass(frozen=True)
class Layers(Parameter):
    """Block indices at which a method reduces: increasing, from 0 to depth - 1; () for none."""

    @property
    def accepts(self) -> str:
        return "a list of increasing block indices, counted from 0"

    def check(self, value: Any, where: str) -> tuple[int, ...] | None:
        if value is None and self.default is None:
            return None
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise self.reject(value, where)
        if not all(_whole(v) and v >= 0 for v in value):
            raise self.reject(value, where)
        layers = tuple(int(v) for v in value)
        if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise self.reject(value, where)
        return layers


@dataclass(frozen=True)
class Counts(Parameter):
    """Patches left after each block, prefix excluded: one entry a block, never increasing, >= 1."""

    default: Any = None

    @property
    def accepts(self) -> str:
        return "a list with the patches left after each block: never increasing, at least 1"

    def check(self, value: Any, where: str) -> tuple[int, ...] | None:
        if value is None:
            return None
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
            raise self.reject(value, where)
        if not all(_whole(v) and v >= 1 for v in value):
            raise self.reject(value, where)
        counts = tuple(int(v) for v in value)
        if any(b > a for a, b in zip(counts, counts[1:], strict=False)):
            raise self.reject(value, where)
        return counts


@dataclass(frozen=True)
class Rates(Parameter):
    """Fractions of the patches, one a prune layer: 0 < rate <= 1."""

    @property
    def accepts(self) -> str:
        return "a list of fractions, 0 < fraction <= 1, one a prune layer"

    def check(self, value: Any, where: str) -> tuple[float, ...]:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise self.reject(value, where)
        if not all(_real(v) and 0 < v <= 1 for v in value):
            raise self.reject(value, where)
        return tuple(float(v) for v in value)


@dataclass(frozen=True)
class IntOrList(Parameter):
    """One whole number for every block (or other `each`), or a list with one for each, >= low."""

    low: int = 0
    each: str = "block"

    @property
    def accepts(self) -> str:
        return f"a whole number >= {self.low}, or a list of them, one a {self.each}"

    def check(self, value: Any, where: str) -> int | tuple[int, ...]:
        if _whole(value) and value >= self.low:
            return int(value)
        several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        if several and value and all(_whole(v) and v >= self.low for v in value):
            return tuple(int(v) for v in value)
        raise self.reject(value, where)


def check_values(
    declared: Sequence[Parameter], given: dict[str, Any], where: str, optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Every declared parameter with its value, checked, defaults filled in, in declared order.

    Parameters named in `optional` may be missing even where they have no default; they then stay
    out. Raises BadInput for an unknown name (with the nearest one), a missing one, a bad value.
    """
    names = [p.name for p in declared]
    for name in given:
        if name not in names:
            raise BadInput(f"{where} has no parameter {name!r}{nearest(name, names)}")
    out: dict[str, Any] = {}
    skip = set(optional)
    for p in declared:
        if p.name in given:
            out[p.name] = p.check(given[p.name], where)
        elif not isinstance(p.default, Required):
            out[p.name] = p.default
        elif p.name not in skip:
            raise BadInput(f"{where} needs {p.name}: {p.accepts}")
    return out
