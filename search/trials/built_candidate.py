"""A candidate once it is built: its cost before it runs, and the results that need no measurement.

Does not import ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitpareto import methods
from vitpareto.methods import ModelShape, Recipe, recipe_of
from vitpareto.search.measure.closed_form import recipe_macs, schedule_macs
from vitpareto.search.measure.memory import count_parameters
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.rungs import OUTSIDE_BUDGETS, SAME_CANDIDATE


@dataclass(frozen=True)
class KnownCost:
    """A built candidate's cost before it runs.

    params_m: parameters in millions. macs: fewest and most MACs an image can cost. adaptive: images
    decide the cost; otherwise both bounds are equal.
    """

    params_m: float
    macs: tuple[int, int]
    adaptive: bool

    @classmethod
    def of(cls, model: nn.Module, recipe: Recipe, shape: ModelShape) -> KnownCost:
        counts: tuple[int, ...] | None = shape.dense_counts()
        if recipe.tokens is not None:
            counts = recipe.tokens.declared.counts(recipe.tokens.params, shape)
        if counts is None:
            macs = recipe_macs(recipe, shape)
        else:
            macs = (schedule_macs(recipe, shape, counts),) * 2
        return cls(count_parameters(model) / 1e6, macs, adaptive=counts is None)

    @property
    def values(self) -> dict[str, float]:
        """The objectives that are known: params_m, and gmacs unless images decide it."""
        known = {"params_m": self.params_m}
        return known if self.adaptive else {**known, "gmacs": self.macs[0] / 1e9}


@dataclass(frozen=True)
class Candidate:
    """A built recipe with everything that is known of it before it runs.

    proposed: the recipe as the search proposed it. resolved: with weights and calibrated settings
    written into it. key: of the resolved recipe. provenance: how it got its weights.
    """

    model: nn.Module
    proposed: RecordedRecipe
    resolved: RecordedRecipe
    key: str
    cost: KnownCost
    provenance: Provenance

    @classmethod
    def of(
        cls, model: nn.Module, provenance: Provenance, proposed: Recipe | None = None
    ) -> Candidate:
        """The candidate that `model` is; proposed: the model's own recipe by default."""
        recipe, shape = recipe_of(model), methods.model_shape(model)
        return cls(
            model,
            RecordedRecipe.of(recipe if proposed is None else proposed),
            RecordedRecipe.of(recipe),
            recipe.key(shape),
            KnownCost.of(model, recipe, shape),
            provenance,
        )

    @property
    def is_dense(self) -> bool:
        return self.resolved == RecordedRecipe()

    def outside(self, trial: int, values: dict[str, float]) -> TrialResult:
        """The result of a candidate that lies outside the study's limits."""
        return TrialResult(
            trial, "failed", self.proposed, self.key, values, self.resolved, reason=OUTSIDE_BUDGETS
        )

    def copied(self, trial: int, known: TrialResult, seconds: float) -> TrialResult:
        """The result of a candidate that an earlier trial measured; seconds: until it was built."""
        return TrialResult(
            trial=trial,
            state=known.state,
            recipe=self.proposed,
            key=self.key,
            values=known.values,
            resolved=self.resolved,
            images=known.images,
            bits=known.bits,
            top1_low=known.top1_low,
            top1_high=known.top1_high,
            seconds=seconds,
            reason=f"{SAME_CANDIDATE} {known.trial}",
            provenance=known.provenance.updated(self.provenance),
        )
