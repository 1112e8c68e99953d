"""Optuna inside Ray Tune: a small Searcher over ask and tell, with the study on disk as the truth.

Ray's own OptunaSearch tells stopped multi-objective trials as complete, leaves NaN trials running
for ever, and Tuner.restore forgets or duplicates trials; so nothing is taken from Ray's state here.
A trial that is asked for is looked at before it becomes work: candidates already measured are told
their values, those outside the budget window are told as constraint violations.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from vitpareto.methods import BadInput, ModelShape, Recipe
from vitpareto.search.measure.closed_form import recipe_macs
from vitpareto.search.study.budget_window import BudgetWindow
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import Front, reference_point
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.optuna_storage import frozen_trials, open_storage, study_name
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.rungs import SAME_CANDIDATE
from vitpareto.search.study.samplers import make_sampler
from vitpareto.search.study.space import Space
from vitpareto.search.trials.early_stopping import EarlyStopping
from vitpareto.search.trials.trial_actor import RUNG

#: asks in a row that bring nothing new before the space counts as exhausted
BARREN_ASKS = 100
#: times a trial is started again after its worker died
RETRIES = 3
#: the same, of those that a driver left behind: its end is seldom a trial's doing
INTERRUPTED = "interrupted"
INTERRUPTIONS = 20
#: by how much the hypervolume has to grow to count as grown
GROWTH = 1e-3
#: what Optuna is told of a trial that was stopped: its "estimate", or that it was "pruned"
TELL_RACED = "pruned"

log = logging.getLogger("vitpareto")
# every ask and tell would be a line; the progress line says what matters
optuna.logging.set_verbosity(optuna.logging.WARNING)


def running_trials(folder: StudyFolder) -> list[TrialResult]:
    """What a live driver has handed out and not heard of yet; nothing is written."""
    if not folder.running:
        return []
    done = {r.trial for r in folder.results()}
    return [
        TrialResult(t.number, "running", t.user_attrs["recipe"], str(t.user_attrs["key"]))
        for t in frozen_trials(folder)
        if t.state == TrialState.RUNNING
        and t.number not in done
        and "key" in t.user_attrs
        and "duplicate_of" not in t.user_attrs
    ]


def _first_line(error: Exception) -> str:
    return (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]


@dataclass
class Tally:
    """How a study stands, for progress lines."""

    #: trials in all; None: as many as come
    wanted: int | None = 0
    finished: int = 0
    raced_out: int = 0
    failed: int = 0
    running: int = 0
    duplicates: int = 0
    outside: int = 0
    hypervolume: float = 0.0
    front: tuple[int, ...] = ()
    images: int = 0
    #: trials since the hypervolume last grew
    barren: int = 0
    ended: str = ""

    @property
    def done(self) -> int:
        """Trials with a durable result."""
        return self.finished + self.raced_out + self.failed


@dataclass
class _Running:
    trial: optuna.Trial
    key: str
    recipe: Recipe
    waiting: list[optuna.Trial] = field(default_factory=list)


class FrontSearcher(Searcher):
    """Asks Optuna, filters, and tells it what the workers made durable.

    `hooks` are called with every new TrialResult and the Tally; a hook must not raise.
    """

    def __init__(
        self,
        folder: StudyFolder,
        space: Space,
        *,
        objectives: tuple[str, ...],
        sampler: str,
        seed: int,
        trials: int | None,
        window: tuple[float | None, float | None] = (None, None),
        reshape: Callable[[Recipe], ModelShape],
        hooks: list[Callable[[TrialResult | None, Tally], None]] | None = None,
        judge: EarlyStopping | None = None,
        tell_raced: str = TELL_RACED,
        patience: int | None = None,
        seconds: float | None = None,
        storage: optuna.storages.BaseStorage | None = None,
    ) -> None:
        """judge: decides at every rung who climbs on (None: all do). tell_raced: what Optuna hears
        of a trial that was stopped, its "estimate" or "pruned". patience: trials in a row without
        growth of the hypervolume after which the study ends; seconds: after which nothing new is
        begun. storage: Optuna's, where it is not the folder's journal.
        """
        super().__init__(metric="top1", mode="max")
        self.folder, self.space = folder, space
        self.objectives = tuple(OBJECTIVES[o] for o in objectives)
        self.window, self.reshape = window, reshape
        self.hooks = hooks or []
        self.judge, self.tell_raced = judge, tell_raced
        self.patience, self.seconds, self.begin = patience, seconds, time.monotonic()
        self.grown = 0.0
        self.study = optuna.create_study(
            storage=open_storage(folder) if storage is None else storage,
            study_name=study_name(folder),
            directions=[o.direction for o in self.objectives],
            load_if_exists=True,
        )
        results = {r.trial: r for r in folder.results()}
        self._refill(results)
        past = self.study.get_trials(deepcopy=False)
        # a restarted sampler must not repeat its draws
        self.study.sampler = make_sampler(sampler, seed + len(past))
        self.running: dict[str, _Running] = {}
        self.by_key: dict[str, TrialResult] = {}
        self.outside: dict[str, float] = {}
        self.front: Front | None = None
        self.reference_again: optuna.Trial | None = None
        self.away = False
        #: nothing is proposed the next time that Ray asks: it has something better to do first
        self.later = False
        self.tally = Tally(wanted=trials)
        self._recover(past, results)

    # -- start ---------------------------------------------------------------------------------

    def _refill(self, results: dict[int, TrialResult]) -> None:
        """A storage that was lost knows no trial of which there is a result: their numbers are
        taken again, so that no later trial writes over one.
        """
        known = len(self.study.get_trials(deepcopy=False))
        for number in range(known, max(results, default=-1) + 1):
            result = results.get(number)
            if result is None or result.state != "finished":
                self.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
                continue
            self.study.add_trial(
                optuna.trial.create_trial(
                    values=[result.values[o.name] for o in self.objectives],
                    user_attrs={"recipe": result.recipe, "key": result.key},
                )
            )

    def _recover(self, past: list[FrozenTrial], results: dict[int, TrialResult]) -> None:
        """Results on disk are told; what was in flight is failed and enqueued again."""
        for result in results.values():
            self._remember(result)
        for frozen in past:
            if frozen.state != TrialState.RUNNING:
                continue
            durable = results.get(frozen.number)
            if durable is not None:
                self._tell(frozen.number, durable)
            else:
                self._again(frozen, INTERRUPTED)
        if not self.study.user_attrs.get("started"):
            self.study.enqueue_trial({}, user_attrs={"reference": True})
            for name, params in self.space.preset_params():
                self.study.enqueue_trial(params, user_attrs={"preset": name})
            self.study.set_user_attr("started", True)

    def _again(self, frozen: FrozenTrial, why: str) -> None:
        """Tell FAIL with the reason, and put the same parameters at the queue's end, at most
        RETRIES (INTERRUPTIONS) times over; then the trial is a failed result."""
        ours = why == INTERRUPTED
        counted, most = ("interruptions", INTERRUPTIONS) if ours else ("retries", RETRIES)
        counts = {k: int(frozen.user_attrs.get(k, 0)) for k in ("retries", "interruptions")}
        counts[counted] += 1
        once_more = counts[counted] <= most
        if frozen.user_attrs.get("reference") and once_more:
            # the dense model stays trial 0: the same Optuna trial is handed out once more
            self.reference_again = optuna.Trial(self.study, frozen._trial_id)
            self.reference_again.set_user_attr(counted, counts[counted])
            return
        if once_more:
            attrs: dict[str, Any] = {"retry_of": frozen.number, **counts}
            if "preset" in frozen.user_attrs:
                attrs["preset"] = frozen.user_attrs["preset"]
            # before it is failed: a kill in between runs it twice over at worst, and the second
            # is told what the first measured
            self.study.enqueue_trial(frozen.params, user_attrs=attrs)
        self.study._storage.set_trial_user_attr(frozen._trial_id, "reason", why)
        self.study.tell(frozen.number, state=TrialState.FAIL, skip_if_finished=True)
        if once_more:
            return
        recipe = frozen.user_attrs.get("recipe", {})
        result = TrialResult(
            frozen.number, "failed", recipe, str(frozen.user_attrs.get("key", "")),
            reason=f"{why}, {counts[counted]} times",
        )  # fmt: skip
        self.folder.write(result)
        self._remember(result)

    # -- Ray's side ----------------------------------------------------------------------------

    @property
    def done(self) -> int:
        return self.tally.done

    def suggest(self, trial_id: str) -> Any:
        """The next candidate that has to be measured; None: not now; FINISHED: nothing more."""
        if self.tally.ended:
            return Searcher.FINISHED
        if self.later:
            self.later = False
            return None
        wanted = self.tally.wanted
        if wanted is not None and self.done >= wanted:
            return self._end(f"{self.done} trials measured")
        if self.seconds is not None and time.monotonic() - self.begin >= self.seconds:
            return self._end(f"the time is up: {self.seconds:g} s; {self.done} trials measured")
        if self.patience is not None and self.tally.barren >= self.patience:
            return self._end(
                f"the hypervolume has not grown by {GROWTH:.1%} for {self.tally.barren} trials; "
                f"{self.done} measured"
            )
        if wanted is not None and self.done + len(self.running) >= wanted:
            return None  # one of those running may die and has then to run again
        if self.front is None and self.running:
            return None  # nothing is compared with before the reference is known
        for _ in range(BARREN_ASKS):
            try:
                asked = self._ask()
            except optuna.exceptions.StorageInternalError as error:
                return self._wait_for_storage(error)
            self.away = False
            if asked is not None:
                self.running[trial_id] = asked
                self._report(None)
                return {
                    "trial": asked.trial.number,
                    "key": asked.key,
                    "recipe": asked.recipe.to_dict(),
                }
        if self.running:
            return None  # their results may open new ground
        return self._end(
            f"{BARREN_ASKS} proposals in a row brought nothing new: the space "
            f"{'inside the budget window ' if self.outside else ''}is exhausted"
        )

    def _wait_for_storage(self, error: Exception) -> None:
        """A database that is away is asked again by and by: nothing is proposed meanwhile."""
        if not self.away:
            log.warning("Optuna's storage does not answer; waiting for it: %s", _first_line(error))
        self.away = True
        time.sleep(1.0)

    def _end(self, why: str) -> str:
        self.tally.ended = why
        self._report(None)
        return Searcher.FINISHED

    def _ask(self) -> _Running | None:
        """One ask; None if it needs no measurement (told at once)."""
        trial, self.reference_again = self.reference_again or self.study.ask(), None
        try:
            recipe = Recipe()
            if not trial.user_attrs.get("reference"):
                recipe = self.space.suggest(trial, self.reshape)
            shape = self.reshape(recipe)
        except BadInput as error:  # a choice that this model does not allow
            trial.set_user_attr("reason", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        key = recipe.key(shape)
        trial.set_user_attr("recipe", recipe.to_dict())
        trial.set_user_attr("key", key)
        known = self.by_key.get(key)
        if known is not None:
            trial.set_user_attr("duplicate_of", known.trial)
            self.tally.duplicates += 1
            self._tell(trial.number, known)
            return None
        for other in self.running.values():
            if other.key == key:
                trial.set_user_attr("duplicate_of", other.trial.number)
                self.tally.duplicates += 1
                other.waiting.append(trial)
                return None
        if recipe != Recipe():
            violation = self.outside.get(key, self._violation(recipe, shape))
            if violation > 0:
                self._tell_outside(trial, key, violation)
                return None
        return _Running(trial, key, recipe)

    def _violation(self, recipe: Recipe, shape: ModelShape) -> float:
        """Distance of the recipe's possible costs [low, high] to the window; <= 0: they meet."""
        low, high = (m / 1e9 for m in recipe_macs(recipe, shape))
        floor, ceiling = self.window
        if recipe.structure is not None:
            # one that costs more than the dense model (ReViT may) is no reduction of it
            dense = recipe_macs(Recipe(), self.reshape(Recipe()))[0] / 1e9
            ceiling = dense if ceiling is None else min(ceiling, dense)
        return BudgetWindow(floor, ceiling).violation_between(low, high)

    def _tell_outside(self, trial: optuna.Trial, key: str, violation: float) -> None:
        self.outside[key] = violation
        self.tally.outside += 1
        trial.set_constraint("budgets", violation)
        # PRUNED: it was never measured, so it has no values; TPE reads the violation
        self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Rungs are the scheduler's to ask about, by `climbs`."""

    def climbs(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial goes on to its next rung. Where it does not, its result is durable when
        this returns. Never raises.
        """
        asked, rung = self.running.get(trial_id), result.get(RUNG)
        if asked is None or rung is None or self.judge is None:
            return True
        try:
            stopped = self.judge.on_rung(asked.trial.number, asked.recipe, rung)
            if stopped is None:
                return True
            self.folder.write(stopped)
            shutil.rmtree(self.folder.training(asked.key), ignore_errors=True)
            return False
        except Exception:
            log.exception("trial %d could not be judged; it climbs on", asked.trial.number)
            return True

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Idempotent, and never raises: Ray would call it a second time, without the result."""
        asked = self.running.pop(trial_id, None)
        if asked is None:
            return
        try:
            self._complete(asked, result, error)
        except Exception:
            log.exception("trial %d could not be told; its result file stays", asked.trial.number)

    def _complete(self, asked: _Running, result: dict[str, Any] | None, error: bool) -> None:
        number = asked.trial.number
        durable = self.folder.result(number)
        if durable is not None:
            self._remember(durable)
            self._tell(number, durable)
            for waiting in asked.waiting:
                self._tell(waiting.number, durable)
            self._report(durable)
            return
        if result is not None and result.get("outside"):
            violation = float(result["violation"])
            for trial in (asked.trial, *asked.waiting):
                self._tell_outside(trial, asked.key, violation)
            self._report(None)
            return
        why = "the worker died" if error else "stopped before it was measured"
        frozen = self.study.get_trials(deepcopy=False)[number]
        for trial in asked.waiting:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self._again(frozen, why)
        if (lost := self.folder.result(number)) is not None:
            self._report(lost)

    # -- Optuna's side -------------------------------------------------------------------------

    def _tell(self, number: int, result: TrialResult) -> None:
        if result.state == "failed":
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            return
        if result.state == "raced_out":
            attribute = {
                "images": result.images, "low": result.top1_low, "high": result.top1_high,
            }  # fmt: skip
            trial_id = self.study._storage.get_trial_id_from_study_id_trial_number(
                self.study._study_id, number
            )
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                self.study._storage.set_trial_user_attr(trial_id, "raced_out", attribute)
            if self.tell_raced == "pruned":
                self.study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
                return
        values = [result.values[o.name] for o in self.objectives]
        self.study.tell(number, values=values, skip_if_finished=True)

    def _remember(self, result: TrialResult) -> None:
        """Count a durable result and let it into the front."""
        self.by_key.setdefault(result.key, result)
        if result.resolved is not None:
            self.by_key.setdefault(self._asked_key(result), result)
        self.tally.images += 0 if result.reason.startswith(SAME_CANDIDATE) else result.images
        self.tally.barren += 1
        if self.judge is not None:
            self.judge.on_result(result)
        if result.state == "raced_out":
            self.tally.raced_out += 1
            return
        if result.state == "failed":
            self.tally.failed += 1
            if result.is_reference:
                self.tally.ended = f"the dense model could not be measured: {result.reason}"
            return
        self.tally.finished += 1
        if self.front is None and result.is_reference:
            names = {o.name for o in self.objectives}
            dense = {k: v for k, v in result.values.items() if k in names}
            self.front = Front(self.objectives, reference_point(dense, self.objectives))
            for other in self.by_key.values():
                if other.state == "finished":
                    self.front.add(other.trial, other.values)
        elif self.front is not None:
            self.front.add(result.trial, result.values)
        if self.front is not None:
            self.tally.hypervolume = self.front.progress()
            if result.is_reference or self.tally.hypervolume > (1 + GROWTH) * self.grown:
                self.grown, self.tally.barren = self.tally.hypervolume, 0
            self.tally.front = tuple(m.trial for m in self.front.members())

    def _asked_key(self, result: TrialResult) -> str:
        """The key of the recipe as proposed (a calibrated one has another once resolved)."""
        recipe = Recipe.from_dict(result.recipe)
        return recipe.key(self.reshape(recipe))

    def _report(self, result: TrialResult | None) -> None:
        self.tally.running = len(self.running)
        for hook in self.hooks:
            try:
                hook(result, self.tally)
            except Exception:
                log.exception("a progress hook raised; the search goes on")

    # -- Ray's persistence, which is not ours --------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Ray pickles the searcher when it starts and never reads it; hooks hold threads."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrontSearcher:
        """Itself: a copy would ask and tell beside the original."""
        return self

    def save(self, checkpoint_path: str) -> None:
        """A stub: the study on disk is the truth."""
        Path(checkpoint_path).write_text("see the study folder\n", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study folder was read at the start."""
