"""The range of compute costs that a study accepts. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetWindow:
    """Accepted cost of a candidate, in GMACs per image; None means no bound on that side."""

    low: float | None = None
    high: float | None = None

    @property
    def is_open(self) -> bool:
        """True if neither side is bounded."""
        return self.low is None and self.high is None

    def violation(self, gmacs: float) -> float:
        """Distance of a known cost to the window, in GMACs; <= 0 inside."""
        return self.violation_between(gmacs, gmacs)

    def violation_between(self, low: float, high: float) -> float:
        """Distance of the range of possible costs [low, high] to the window, in GMACs; <= 0 if they
        overlap.
        """
        distances = []
        if self.low is not None:
            distances.append(self.low - high)
        if self.high is not None:
            distances.append(low - self.high)
        return max(distances, default=0.0)

    def __str__(self) -> str:
        low, high = ("any" if v is None else f"{v:g}" for v in (self.low, self.high))
        return f"{low} to {high} GMACs"
