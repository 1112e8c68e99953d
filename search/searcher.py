"""Optuna inside Ray Tune: a small Searcher over ask and tell, with the study on disk as the truth.

Ray's own OptunaSearch tells stopped multi-objective trials as complete, leaves NaN trials running
for ever, and Tuner.restore forgets or duplicates trials; so nothing is taken from Ray's state here.
A trial that is asked for is looked at before it becomes work: candidates already measured are told
their values, those outside the budget window are told as constraint violations.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from methods import BadInput, ModelShape, Recipe
from search.cost import recipe_macs
from search.pareto import Front, reference_point
from search.results import OBJECTIVES, TrialResult
from search.space import Space
from search.store import StudyFolder
from search.trial import window_violation

#: asks in a row that bring nothing new before the space counts as exhausted
BARREN_ASKS = 100
#: times a trial is started again after its worker or driver died
RETRIES = 3

log = logging.getLogger("vitpareto")
# every ask and tell would be a line; the progress line says what matters
optuna.logging.set_verbosity(optuna.logging.WARNING)


def open_storage(journal: Path) -> optuna.storages.JournalStorage:
    """Optuna's journal, repaired after a kill: a half-written last line and a stale lock go.

    Only for the driver that holds the study's lock: nobody else writes.
    """
    for stale in journal.parent.glob(f"{journal.name}.lock*"):
        stale.unlink(missing_ok=True)
    if journal.exists():
        data = journal.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with open(journal, "r+b") as handle:
                handle.truncate(whole)
                handle.flush()
                os.fsync(handle.fileno())
    return optuna.storages.JournalStorage(JournalFileBackend(str(journal)))


def running_trials(folder: StudyFolder) -> list[TrialResult]:
    """What a live driver has handed out and not heard of yet; nothing is written."""
    if not folder.running or not folder.journal.exists():
        return []
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder.journal)))
    study = optuna.load_study(study_name=folder.name, storage=storage)
    done = {r.trial for r in folder.results()}
    return [
        TrialResult(t.number, "running", t.user_attrs["recipe"], str(t.user_attrs["key"]))
        for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if t.number not in done and "key" in t.user_attrs and "duplicate_of" not in t.user_attrs
    ]


def make_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """tpe | nsga2 | random, reseeded by the caller after a restart."""
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    with warnings.catch_warnings():
        # `group` is what makes TPE work on conditional spaces; Optuna marks it experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            multivariate=True, group=True, constant_liar=True, seed=seed
        )


@dataclass
class Tally:
    """How a study stands, for progress lines."""

    wanted: int = 0
    finished: int = 0
    failed: int = 0
    running: int = 0
    duplicates: int = 0
    outside: int = 0
    hypervolume: float = 0.0
    front: tuple[int, ...] = ()
    ended: str = ""


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
        trials: int,
        window: tuple[float | None, float | None] = (None, None),
        reshape: Callable[[Recipe], ModelShape],
        hooks: list[Callable[[TrialResult | None, Tally], None]] | None = None,
    ) -> None:
        super().__init__(metric="top1", mode="max")
        self.folder, self.space = folder, space
        self.objectives = tuple(OBJECTIVES[o] for o in objectives)
        self.window, self.reshape = window, reshape
        self.hooks = hooks or []
        storage = open_storage(folder.journal)
        self.study = optuna.create_study(
            storage=storage,
            study_name=folder.name,
            directions=[o.direction for o in self.objectives],
            load_if_exists=True,
        )
        past = self.study.get_trials(deepcopy=False)
        # a restarted sampler must not repeat its draws
        self.study.sampler = make_sampler(sampler, seed + len(past))
        self.running: dict[str, _Running] = {}
        self.by_key: dict[str, TrialResult] = {}
        self.outside: dict[str, float] = {}
        self.front: Front | None = None
        self.reference_again: optuna.Trial | None = None
        self.tally = Tally(wanted=trials)
        self._recover(past)

    # -- start ---------------------------------------------------------------------------------

    def _recover(self, past: list[FrozenTrial]) -> None:
        """Results on disk are told; what was in flight is failed and enqueued again."""
        results = {r.trial: r for r in self.folder.results()}
        for result in results.values():
            self._remember(result)
        for frozen in past:
            if frozen.state != TrialState.RUNNING:
                continue
            durable = results.get(frozen.number)
            if durable is not None:
                self._tell(frozen.number, durable)
            else:
                self._again(frozen, "interrupted")
        if not self.study.user_attrs.get("started"):
            self.study.enqueue_trial({}, user_attrs={"reference": True})
            for name, params in self.space.preset_params():
                self.study.enqueue_trial(params, user_attrs={"preset": name})
            self.study.set_user_attr("started", True)

    def _again(self, frozen: FrozenTrial, why: str) -> None:
        """Tell FAIL with the reason, and put the same parameters at the queue's end, at most
        RETRIES times over; then the trial is a failed result."""
        retries = int(frozen.user_attrs.get("retries", 0))
        if frozen.user_attrs.get("reference") and retries < RETRIES:
            # the dense model stays trial 0: the same Optuna trial is handed out once more
            self.reference_again = optuna.Trial(self.study, frozen._trial_id)
            self.reference_again.set_user_attr("retries", retries + 1)
            return
        if retries < RETRIES:
            attrs = {"retry_of": frozen.number, "retries": retries + 1}
            if "preset" in frozen.user_attrs:
                attrs["preset"] = frozen.user_attrs["preset"]
            # before it is failed: a kill in between runs it twice over at worst, and the second
            # is told what the first measured
            self.study.enqueue_trial(frozen.params, user_attrs=attrs)
        self.study._storage.set_trial_user_attr(frozen._trial_id, "reason", why)
        self.study.tell(frozen.number, state=TrialState.FAIL, skip_if_finished=True)
        if retries < RETRIES:
            return
        recipe = frozen.user_attrs.get("recipe", {})
        result = TrialResult(
            frozen.number, "failed", recipe, str(frozen.user_attrs.get("key", "")),
            reason=f"{why}, {retries + 1} times",
        )  # fmt: skip
        self.folder.write(result)
        self._remember(result)

    # -- Ray's side ----------------------------------------------------------------------------

    @property
    def done(self) -> int:
        return self.tally.finished + self.tally.failed

    def suggest(self, trial_id: str) -> Any:
        """The next candidate that has to be measured; None: not now; FINISHED: nothing more."""
        if self.tally.ended:
            return Searcher.FINISHED
        if self.done >= self.tally.wanted:
            return self._end(f"{self.done} trials measured")
        if self.done + len(self.running) >= self.tally.wanted:
            return None  # one of those running may die and has then to run again
        if self.front is None and self.running:
            return None  # nothing is compared with before the reference is known
        for _ in range(BARREN_ASKS):
            asked = self._ask()
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
            self._tell_values(trial.number, known)
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
        return max(window_violation(low, (None, ceiling)), window_violation(high, (floor, None)))

    def _tell_outside(self, trial: optuna.Trial, key: str, violation: float) -> None:
        self.outside[key] = violation
        self.tally.outside += 1
        trial.set_constraint("budget window", violation)
        # PRUNED: it was never measured, so it has no values; TPE reads the violation
        self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Rungs come with racing; a trial reports once."""

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
                self._tell_values(waiting.number, durable)
            self._report(durable)
            return
        if result is not None and result.get("outside"):
            violation = window_violation(result["gmacs"], self.window)
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
        if result.state == "finished":
            self._tell_values(number, result)
        else:
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _tell_values(self, number: int, result: TrialResult) -> None:
        if result.state != "finished":
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            return
        values = [result.values[o.name] for o in self.objectives]
        self.study.tell(number, values=values, skip_if_finished=True)

    def _remember(self, result: TrialResult) -> None:
        """Count a durable result and let it into the front."""
        self.by_key.setdefault(result.key, result)
        if result.resolved is not None:
            self.by_key.setdefault(self._asked_key(result), result)
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
