"""The Ray Tune trainable that runs trials: a warm actor, reused from trial to trial.

It hands proposals to a `Worker`, writes results and reports rungs; how a recipe is measured is
`search.trials.measurement`'s.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from ray import tune

from vitpareto.methods import BadInput, Recipe
from vitpareto.search.files.atomic import delete_tree
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.rungs import OUTSIDE_BUDGETS, RungReport
from vitpareto.search.study.trial_files import StaleWorker
from vitpareto.search.trials.measurement import limit_violation, run_rungs
from vitpareto.search.trials.task import TrialTask
from vitpareto.search.trials.worker import Worker

#: key of a report to Ray that holds its `RungReport`
RUNG = "rung"
#: key of a report to Ray that holds the `BadInput` for which this process cannot take part
REFUSED = "refused"


class TrialActor(tune.Trainable):
    """One step is one rung of a trial; Ray resets the actor for the next trial."""

    #: why this process cannot take part; its steps report it
    refusal: BadInput | None = None

    def setup(self, config: dict[str, Any], task: TrialTask | None = None) -> None:
        assert task is not None, "tune.with_parameters passes the task"
        try:
            self.worker = Worker.open(task)
        except BadInput as error:  # raised here, Ray would start the actor again
            self.refusal = error
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.proposal = new_config
        self.steps: Iterator[RungReport | TrialResult] | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Measure one rung. A result is written before Ray gets the report."""
        if self.refusal is not None:
            return {"done": True, "top1": 0.0, REFUSED: self.refusal}
        task = self.worker.task
        result = self._next_step()
        if isinstance(result, RungReport):
            return {"done": False, "top1": result.values["top1"], RUNG: result}
        outside = result.reason == OUTSIDE_BUDGETS
        if not outside:
            task.study.folder.trials.write(result, task.study.epoch)
        # the result is durable, so the training's checkpoint is no longer needed
        delete_tree(task.study.folder.training(str(self.proposal["key"])))
        return {
            "done": True,
            "trial_number": result.trial,
            "outside": outside,
            "violation": limit_violation(result, task),
            "top1": result.values.get("top1", 0.0),
        }

    def _next_step(self) -> RungReport | TrialResult:
        """The next rung's report or the result; a recipe that raises gives a failed result."""
        trial, recipe = int(self.proposal["trial"]), Recipe.from_dict(self.proposal["recipe"])
        if self.steps is None:
            self.steps = run_rungs(self.worker, trial, recipe)
        try:
            return next(self.steps)
        except (StaleWorker, torch.AcceleratorError):
            raise  # a GPU in an error state fails everything after it: this process must end
        except Exception as error:
            trace = "".join(traceback.format_exception(error))[-4000:]
            return TrialResult(
                trial,
                "failed",
                RecordedRecipe.of(recipe),
                str(self.proposal["key"]),
                reason=f"{type(error).__name__}: {error}",
                provenance=replace(self.worker.task.provenance, traceback=trace),
            )

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Saves nothing: the result file is the state."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Loads nothing: nothing was saved."""


def trainable_of(task: TrialTask) -> type[tune.Trainable]:
    """The trainable whose actors get this task, each once."""
    trainable: type[tune.Trainable] = tune.with_parameters(TrialActor, task=task)
    return trainable
