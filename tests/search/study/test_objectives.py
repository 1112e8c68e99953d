"""The table of objectives and the lookup by name."""

from __future__ import annotations

from tests.refusals import refused
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.study.objectives import OBJECTIVES, objectives_named


def test_objectives_are_looked_up_by_name():
    assert objectives_named(["gmacs"]) == (OBJECTIVES["gmacs"],)
    with refused(Code.UNKNOWN_NAME, name="gmac", closest="gmacs"):
        objectives_named(("top1", "gmac"))
    with refused(Code.DUPLICATE, name="top1"):
        objectives_named(("top1", "top1"))


def test_directions_of_the_objectives() -> None:
    directions = {name: o.direction for name, o in OBJECTIVES.items()}
    assert {n for n, d in directions.items() if d == "maximize"} == {"top1", "top5", "images_per_s"}
    assert all(name == o.name and o.unit and o.label for name, o in OBJECTIVES.items())
    assert all(o.sign == (1 if o.direction == "minimize" else -1) for o in OBJECTIVES.values())
