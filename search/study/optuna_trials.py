"""Optuna's trials of a study: told their results, retried, and restored from the study folder.

The study folder's results are the truth. Optuna's storage follows them: a RUNNING trial with a
result is told from it, other RUNNING trials are failed and enqueued again, and a lost storage is
filled from the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.objectives import Objective
from vitpareto.search.study.optuna_adapter import reopened, set_trial_attribute
from vitpareto.search.study.optuna_storage import frozen_trials
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.space import Space

#: How often a trial is started again after its worker died.
RETRIES = 3
#: How often a trial is started again after its driver ended, which the trial rarely causes.
INTERRUPTIONS = 20
#: The reason of a trial whose driver ended.
INTERRUPTED = "interrupted"
#: State of a trial that was stopped early in Optuna: COMPLETE with its estimates, or PRUNED.
RacedOutAs = Literal["estimate", "pruned"]
RACED_OUT_AS: RacedOutAs = "pruned"

# Optuna logs a line per ask and tell; the progress line of a search replaces them
optuna.logging.set_verbosity(optuna.logging.WARNING)


def running_trials(folder: StudyFolder) -> list[TrialResult]:
    """Return the trials that a live driver has started and that have no result. Read-only."""
    if not folder.lock.is_held:
        return []
    done = {r.trial for r in folder.trials.all()}
    return [
        TrialResult(
            t.number,
            "running",
            RecordedRecipe.from_json(t.user_attrs["recipe"]),
            str(t.user_attrs["key"]),
        )
        for t in frozen_trials(folder)
        if t.state == TrialState.RUNNING
        and t.number not in done
        and "key" in t.user_attrs
        and "duplicate_of" not in t.user_attrs
    ]


class OptunaTrials:
    """One study's trials in Optuna."""

    def __init__(
        self,
        study: optuna.Study,
        objectives: Sequence[Objective],
        raced_out_as: RacedOutAs = RACED_OUT_AS,
    ) -> None:
        self.study, self.objectives, self.raced_out_as = study, tuple(objectives), raced_out_as
        #: the interrupted trial of the dense model, which is asked for again
        self._reference: optuna.Trial | None = None

    def frozen(self) -> list[FrozenTrial]:
        """Return all trials by number."""
        return self.study.get_trials(deepcopy=False)

    def ask(self) -> optuna.Trial:
        """Return the next trial."""
        trial, self._reference = self._reference or self.study.ask(), None
        return trial

    # -- tell ----------------------------------------------------------------------------------

    def tell(self, number: int, result: TrialResult) -> None:
        """Tell a durable result. No effect if the trial was told before."""
        if result.state == "failed":
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            return
        if result.state == "raced_out":
            estimate = {
                "images": result.images, "low": result.top1_low, "high": result.top1_high,
            }  # fmt: skip
            set_trial_attribute(self.study, number, "raced_out", estimate)
            if self.raced_out_as == "pruned":
                self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
                return
        values = [result.values[o.name] for o in self.objectives]
        self.study.tell(number, values=values, skip_if_finished=True)

    def tell_invalid(self, trial: optuna.Trial, reason: str) -> None:
        """Tell that the model does not allow the proposal."""
        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=TrialState.FAIL)

    def tell_outside(self, trial: optuna.Trial, violation: float) -> None:
        """Tell that the proposal is outside the budget window.

        violation: distance to the window in GMACs.
        """
        trial.set_constraint("budgets", violation)
        # PRUNED: it has no values because it was not measured; TPE reads the violation
        self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)

    def tell_dropped(self, trial: optuna.Trial) -> None:
        """Tell that the trial whose result this one waited for has none."""
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    # -- start, retry and restore -----------------------------------------------------------------

    def enqueue_initial(self, space: Space) -> None:
        """Enqueue the dense model and the methods' published settings, in a new study."""
        if self.study.user_attrs.get("started"):
            return
        self.study.enqueue_trial({}, user_attrs={"reference": True})
        for name, params in space.preset_params():
            self.study.enqueue_trial(params, user_attrs={"preset": name})
        self.study.set_user_attr("started", True)

    def restore(self, results: Mapping[int, TrialResult]) -> None:
        """Add the trials that have a result and that the storage does not know, because it was
        lost. Their numbers are used up, so that no later trial overwrites a result.
        """
        known = len(self.frozen())
        for number in range(known, max(results, default=-1) + 1):
            result = results.get(number)
            if result is None or result.state != "finished":
                self.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                continue
            self.study.add_trial(
                optuna.trial.create_trial(
                    values=[result.values[o.name] for o in self.objectives],
                    user_attrs={"recipe": result.recipe.to_json(), "key": result.key},
                )
            )

    def retry(self, frozen: FrozenTrial, reason: str) -> TrialResult | None:
        """Fail a trial without a result and enqueue its parameters again.

        The trial of the dense model is not failed but reopened, so that it stays trial 0.

        Args:
            frozen: the trial.
            reason: why it has no result; `INTERRUPTED` if its driver ended.

        Returns:
            The failed result, once the trial was retried `RETRIES` (`INTERRUPTIONS`) times; else
            None.
        """
        counter, most = (
            ("interruptions", INTERRUPTIONS) if reason == INTERRUPTED else ("retries", RETRIES)
        )
        counts = {k: int(frozen.user_attrs.get(k, 0)) for k in ("retries", "interruptions")}
        counts[counter] += 1
        again = counts[counter] <= most
        if frozen.user_attrs.get("reference") and again:
            self._reference = reopened(self.study, frozen)
            self._reference.set_user_attr(counter, counts[counter])
            return None
        if again:
            attributes: dict[str, Any] = {"retry_of": frozen.number, **counts}
            if "preset" in frozen.user_attrs:
                attributes["preset"] = frozen.user_attrs["preset"]
            # enqueued before it is failed: a kill in between costs a duplicate, not a trial
            self.study.enqueue_trial(frozen.params, user_attrs=attributes)
        set_trial_attribute(self.study, frozen.number, "reason", reason)
        self.study.tell(frozen.number, state=TrialState.FAIL, skip_if_finished=True)
        if again:
            return None
        recipe = RecordedRecipe.from_json(frozen.user_attrs.get("recipe", {}))
        key = str(frozen.user_attrs.get("key", ""))
        reason = f"{reason}, {counts[counter]} times"
        return TrialResult(frozen.number, "failed", recipe, key, reason=reason)
