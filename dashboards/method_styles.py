"""The colour and shape of each method, the same in every picture and page.

Uses the colour-blind-safe palette of Okabe and Ito (jfly.uni-koeln.de/color, 2008) without its
black, which is the colour of the front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vitpareto import methods

# The number of shapes and the number of colours have no common factor, so 70 methods look
# different, and methods of the same colour have shapes that are far apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
#: matplotlib's names of markers
_SHAPES = ("o", "s", "^", "D", "v", "P", "<", "X", ">", "h")
_CONTROL_SHAPES = ("o", "s", "^", "D", "v")
GREY = "#6E6E6E"
DENSE = "#B00020"
#: drawn dashed, so that it differs from the front without colours too
CONTROL_FRONT = "#7A1FA2"


@dataclass(frozen=True)
class MethodStyle:
    """How the trials of a method are drawn. Controls are hollow and grey.

    `shape` is matplotlib's name of the marker.
    """

    colour: str
    shape: str
    control: bool

    @property
    def edge(self) -> str:
        """Colour of the marker's edge."""
        return GREY if self.control else "black"


def is_control(method: str) -> bool:
    """Whether a method is a control. Of a recipe with two steps (`a+b`), both must be."""
    known = methods.names()
    return all(part in known and methods.get(part).control for part in method.split("+"))


def styles_of(
    names: Iterable[str], is_control: Callable[[str], bool] = is_control
) -> dict[str, MethodStyle]:
    """A style for each method. Assigned by name, so that equal sets of methods look the same."""
    ordered = sorted(set(names))
    controls = [name for name in ordered if is_control(name)]
    others = [name for name in ordered if not is_control(name)]
    return {
        name: MethodStyle(COLOURS[i % len(COLOURS)], _SHAPES[i % len(_SHAPES)], control=False)
        for i, name in enumerate(others)
    } | {
        name: MethodStyle(GREY, _CONTROL_SHAPES[i % len(_CONTROL_SHAPES)], control=True)
        for i, name in enumerate(controls)
    }
