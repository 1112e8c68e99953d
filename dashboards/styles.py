"""How a method looks, in every picture and page: one colour and one shape each, controls grey.

Okabe and Ito's colour-blind-safe palette (jfly.uni-koeln.de/color, 2008), without the black that
the front is drawn in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vitpareto import methods

#: The dense model's name among the methods.
REFERENCE = methods.Recipe().method
#: The methods that prune without judging anything; every other method has to beat them.
CONTROLS = frozenset(n for n in methods.names() if methods.get(n).control) - {REFERENCE}

# The number of shapes has no common factor with that of colours, so 70 methods look different, and
# methods that share a colour have shapes that are far apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
#: matplotlib's names
_SHAPES = ("o", "s", "^", "D", "v", "P", "<", "X", ">", "h")
_CONTROL_SHAPES = ("o", "s", "^", "D", "v")
GREY = "#6E6E6E"
DENSE = "#B00020"
#: dark, thick and dashed: told from the front by its dashes where colours are not seen
CONTROL_FRONT = "#7A1FA2"


@dataclass(frozen=True)
class Style:
    """How a method's trials look; a control is hollow and grey. shape: matplotlib's name."""

    colour: str
    shape: str
    control: bool

    @property
    def edge(self) -> str:
        return GREY if self.control else "black"


def is_control(method: str, controls: frozenset[str] = CONTROLS) -> bool:
    """A recipe of two parts is one where both are."""
    return all(part in controls for part in method.split("+"))


def styles_of(methods: Iterable[str], controls: frozenset[str] = CONTROLS) -> dict[str, Style]:
    """A style for each method, by name, so that the same set always looks the same."""
    found = set(methods)
    # a second dense one, say in int8
    plain = sorted(m for m in found if is_control(m, controls | {REFERENCE}))
    judged = sorted(found.difference(plain))
    return {
        m: Style(COLOURS[i % len(COLOURS)], _SHAPES[i % len(_SHAPES)], control=False)
        for i, m in enumerate(judged)
    } | {
        m: Style(GREY, _CONTROL_SHAPES[i % len(_CONTROL_SHAPES)], control=True)
        for i, m in enumerate(plain)
    }
