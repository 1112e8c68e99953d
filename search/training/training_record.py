"""What a result says about the training of its weights. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitpareto.search.training.settings import TrainingSettings


@dataclass(frozen=True)
class TrainingRecord:
    """A candidate's own training.

    Attributes:
        loss: mean training loss of the last epoch.
        seconds: duration.
    """

    settings: TrainingSettings
    loss: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The record for a file: the settings' keys, then its own."""
        return {**self.settings.to_json(), "loss": self.loss, "seconds": self.seconds}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> TrainingRecord:
        """The inverse of `to_json`. Raises KeyError for a missing key."""
        return cls(TrainingSettings.from_json(stored), stored["loss"], stored["seconds"])


@dataclass(frozen=True)
class RecoveryRecord:
    """A trial's fine-tuning after the search.

    Attributes:
        from_trial: number of the trial that it starts from.
        from_top1: that trial's accuracy in percent.
        loss: mean training loss of the last epoch.
    """

    settings: TrainingSettings
    from_trial: int
    from_top1: float
    loss: float

    def to_json(self) -> dict[str, Any]:
        """The record for a file: the settings' keys, then its own."""
        return {
            **self.settings.to_json(),
            "from_trial": self.from_trial,
            "from_top1": self.from_top1,
            "loss": self.loss,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RecoveryRecord:
        """The inverse of `to_json`. Raises KeyError for a missing key."""
        own = {name: stored[name] for name in ("from_trial", "from_top1", "loss")}
        return cls(TrainingSettings.from_json(stored), **own)
