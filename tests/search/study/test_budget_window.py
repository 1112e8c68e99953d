"""Distances of costs to a budget window."""

from __future__ import annotations

import pytest

from vitpareto.search.study.budget_window import BudgetWindow


def test_an_open_window_accepts_everything() -> None:
    window = BudgetWindow()
    assert window.is_open
    assert window.violation(1e9) <= 0


@pytest.mark.parametrize(
    ("low", "high", "gmacs", "violation"),
    [(1.0, 2.0, 1.5, -0.5), (1.0, 2.0, 0.25, 0.75), (1.0, 2.0, 2.5, 0.5), (None, 2.0, 3.0, 1.0)],
)
def test_a_violation_is_the_distance_in_gmacs(
    low: float | None, high: float | None, gmacs: float, violation: float
) -> None:
    assert BudgetWindow(low, high).violation(gmacs) == pytest.approx(violation)


def test_a_range_of_costs_is_inside_if_it_overlaps_the_window() -> None:
    window = BudgetWindow(1.0, 2.0)
    assert window.violation_between(0.5, 1.5) <= 0
    assert window.violation_between(0.1, 0.5) == pytest.approx(0.5)
    assert window.violation_between(2.5, 9.0) == pytest.approx(0.5)


def test_its_text_names_both_bounds() -> None:
    assert str(BudgetWindow(None, 2.0)) == "any to 2 GMACs"
