"""A study's preparations as Ray tasks, run before its trials.

Costs must be known before a trial runs, and those of a prepared structural step are known once it
is prepared. So trials start after all shared preparations have finished
(`search.training.preparation_cache` finds earlier ones).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vitpareto import methods
from vitpareto.methods import BadInput, Code
from vitpareto.methods.engine.preparation import PreparationOutcome
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import TrialResult
from vitpareto.search.training.preparation_cache import (
    CachedPreparation,
    PreparationUse,
)
from vitpareto.search.trials.ray_cluster import Finished, run_for_each
from vitpareto.search.trials.task import TrialTask
from vitpareto.search.trials.worker import Worker

#: seconds between two progress reports
REPORT_EVERY_S = 10.0


def prepare_shared(
    names: Iterable[str], task: TrialTask, cpus: float, gpus: float, log: Callable[[str], None]
) -> TrialTask:
    """Run the preparations of these methods, each on its own worker, and record them in the study.

    Returns the task with the study's preparations. Raises UserError, with the reason, for a
    preparation that fails; its progress is kept for the next start.
    """
    training = task.training
    wanted = [
        n for n in names if methods.get(n).needs_preparation and training and training.settings(n)
    ]
    if training is None or not wanted:
        return task
    log(f"preparing {' and '.join(wanted)}, once for all trials")
    folder = task.study.folder
    progress = _ProgressReports(folder, log)
    finished = []
    for done in run_for_each(
        _prepare, task, wanted, cpus=cpus, gpus=gpus,
        poll_s=REPORT_EVERY_S, on_poll=progress.report,
    ):  # fmt: skip
        finished.append(_outcome(done))
        record = finished[-1].record
        found = "prepared" if record.fresh else "found in the cache; prepared"
        log(f"{done.item}: {found} in {record.seconds:.0f} s ({record.key})")
    record_preparations(folder, finished)
    return with_preparations(task)


class _ProgressReports:
    """Reports each new progress line of running preparations once."""

    def __init__(self, study: StudyFolder, log: Callable[[str], None]) -> None:
        self.study, self.log = study, log
        self.last: dict[str, str] = {}

    def report(self, running: Sequence[str]) -> None:
        for name in running:
            line = _read_progress(self.study, name)
            if line and self.last.get(name) != line:
                self.last[name] = line
                self.log(f"{name}: {line}")


def _outcome(done: Finished[str, CachedPreparation]) -> CachedPreparation:
    """The finished preparation. Raises UserError if its input or settings made it fail."""
    error, name = done.error, done.item
    if isinstance(error, (BadInput, FloatingPointError)):
        raise UserError(
            f"preparation of {name} failed: {error}. Its progress is kept: run the same "
            "command to resume; changed settings start a new preparation",
            error.code if isinstance(error, BadInput) else Code.OUT_OF_RANGE,
            method=name,
            reason=str(error),
        ) from error
    return done.result()


def _prepare(task: TrialTask, name: str) -> CachedPreparation:
    """On a worker."""
    trainer = Worker.open(task).trainer
    path = _progress_file(task.study.folder, name)
    path.parent.mkdir(exist_ok=True)
    trainer.log = lambda line: write_atomic(path, line)
    try:
        return trainer.prepare(name)
    finally:
        path.unlink(missing_ok=True)


def _progress_file(study: StudyFolder, name: str) -> Path:
    """Where a worker writes its last progress line."""
    return study.folder / "training" / f"{name}.txt"


def _read_progress(study: StudyFolder, name: str) -> str:
    try:
        return _progress_file(study, name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def record_preparations(study: StudyFolder, prepared: Iterable[CachedPreparation]) -> None:
    """Record in the study what its trials share, and store the weights of structural steps.

    Token methods' weights depend on the structural step under them; a trial stores those it uses.
    A preparation that the study trained stays recorded as its own when it is found again.
    """
    before = {r.key: r for r in study.preparations.read()}
    records = []
    for preparation in prepared:
        record = preparation.record
        if methods.get(record.method).kind == "structure":
            for digest in record.outcome.digests:
                study.artifacts.adopt(digest, preparation.artifacts)
        records.append(before.get(record.key, record))
    study.preparations.write(records)


def structural_outcomes(study: StudyFolder) -> dict[str, PreparationOutcome]:
    """The recorded outcomes of structural methods, by method."""
    return {
        r.method: r.outcome
        for r in study.preparations.read()
        if methods.get(r.method).kind == "structure"
    }


def with_preparations(task: TrialTask) -> TrialTask:
    """The task with the preparations that its study has recorded."""
    if task.training is None:
        return task
    records = {r.method: r for r in task.study.folder.preparations.read()}
    return replace(task, training=replace(task.training, records=records))


def preparation_summary(study: StudyFolder, results: Sequence[TrialResult]) -> list[str]:
    """One line per preparation: how long it took, which study ran it, how many trials used it."""
    counts = Counter[tuple[str, str]]()
    known = {
        (r.method, r.key): PreparationUse(r.method, r.key, r.fresh, r.seconds)
        for r in study.preparations.read()
    }
    for result in results:
        for use in result.provenance.prepared or ():
            counts[use.method, use.key] += 1
            before = known.setdefault((use.method, use.key), use)
            if use.fresh and not before.fresh:  # a trial trained what the others found
                known[use.method, use.key] = use
    lines = []
    for (method, key), use in known.items():
        by = "by this study" if use.fresh else "before this study"
        on, count = f" on {use.on}" if use.on else "", counts[method, key]
        took = "" if use.seconds is None else f"{use.seconds:.0f} s, "
        lines.append(
            f"{method}{on} was prepared once ({took}{by}) and used by {count} "
            f"trial{'' if count == 1 else 's'}"
        )
    return lines
