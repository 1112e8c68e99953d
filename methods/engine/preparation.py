"""Preparation: one training that serves many settings of a method.

A method with `needs_preparation` is prepared before a study's trials. The method decides what is
trained (`Method.prepare`) and which weights a setting takes (`PreparationOutcome`). The caller
provides a `PreparationTrainer`, which trains, stores weights and resumes. Nothing here reads or
writes a file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code

#: What a model of some widths costs, in any unit (`methods.slicing.plan.Cost`).
WidthsCost = Callable[[Any], float]


@dataclass(frozen=True, eq=False)
class Fit:
    """A finished training: the model's state dict, and the mean loss of the last epoch."""

    state: dict[str, Tensor]
    loss: float


@dataclass(frozen=True, eq=False)
class Progress:
    """What an interrupted preparation resumes from: plain JSON values and a state dict."""

    record: dict[str, Any]
    state: dict[str, Tensor]


class PreparationTrainer(Protocol):
    """What a preparation may use. With data-parallel training every process runs the preparation,
    on its share of each batch, and only the first process stores anything.
    """

    @property
    def model(self) -> nn.Module:
        """The model that the step acts on: float32, in eval mode. It must not be changed."""

    @property
    def cost(self) -> WidthsCost | None:
        """The latency table's cost in ms per batch; None without a table, where MACs count."""

    @property
    def epochs(self) -> int:
        """How many epochs of training images the preparation may use in total."""

    @property
    def steps_per_epoch(self) -> int:
        """How many batches one epoch of training images has."""

    def objective(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The scalar loss to minimise, with the study's dense model as the teacher."""

    def calibration_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Calibration images [B, 3, H, W] and labels [B], on the model's device."""

    def fit(self, params: dict[str, Any]) -> Fit:
        """Build the method's step with these parameters on `model` and train it for all epochs.

        An interrupted training resumes from its last epoch.
        """

    def update(self, model: nn.Module, index: int, steps: int) -> None:
        """Train `model` in place for a few steps. `index` selects which images are used."""

    def save_weights(self, state: Mapping[str, Tensor]) -> str:
        """Store a state dict; returns its digest."""

    def load_progress(self) -> Progress | None:
        """The last saved progress; None at the first start."""

    def save_progress(self, progress: Progress) -> None:
        """Replace the saved progress."""

    def report(self, message: str) -> None:
        """Report progress in one line."""


@dataclass(frozen=True)
class PreparationOutcome(ABC):
    """What a preparation produced: which weights, and which dimensions, each setting has."""

    @property
    @abstractmethod
    def digests(self) -> tuple[str, ...]:
        """The digests of all weights that a setting may take."""

    @abstractmethod
    def weights_for(self, params: Mapping[str, Any]) -> str:
        """The digest of the weights for checked parameters. BadInput if they are not prepared."""

    def shape_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Equivalent parameters from which the step's dimensions follow without any weights."""
        return params

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreparationOutcome: ...


@dataclass(frozen=True)
class SharedWeights(PreparationOutcome):
    """One set of weights for every setting. `loss`: the last epoch's mean training loss."""

    weights: str
    loss: float

    @property
    def digests(self) -> tuple[str, ...]:
        return (self.weights,)

    def weights_for(self, params: Mapping[str, Any]) -> str:
        return self.weights

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SharedWeights:
        return cls(str(data["weights"]), float(data["loss"]))


def not_prepared(method: str) -> BadInput:
    """The error for a step whose method has no preparation in the study."""
    return BadInput(
        f"method {method!r} has not been prepared in this study", Code.NOT_FOUND, method=method
    )
