"""Bounds are exact in messages and JSON, and rounded in tables."""

from __future__ import annotations

import pytest

from vitpareto import methods
from vitpareto.methods.engine.parameters import Float, Int


def test_bounds_are_rounded_for_tables_only() -> None:
    spacing = Float("spacing", low=1 / 12, high=1 / 3)
    assert spacing.accepts == "a number in [0.0833333333333, 0.333333333333]"
    assert spacing.accepts_rounded == "a number in [0.0833, 0.333]"
    seed = Int("seed", low=0, high=2**30)
    assert seed.accepts_rounded == seed.accepts == "an integer in [0, 1073741824]"


@pytest.mark.parametrize("name", methods.names())
def test_no_table_shows_more_than_three_digits_of_a_fraction(name: str) -> None:
    method = methods.get(name)
    for parameter in (*method.parameters, *method.space):
        words = parameter.accepts_rounded.replace("[", " ").replace("]", " ").replace(",", " ")
        assert all(len(w.strip("()").lstrip("0.")) <= 3 for w in words.split() if "." in w), words
