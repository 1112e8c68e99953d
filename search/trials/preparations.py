"""A study's preparations as Ray tasks, run before its trials, and what became of them.

Costs are known before anything runs, and those of NViT's snapshots are known once they are there:
so trials begin when everything shared is prepared (`search.training.preparation` finds what was
made before).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import ray

from vitpareto import methods
from vitpareto.methods import BadInput
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.results import TrialResult
from vitpareto.search.training.preparation import Preparation
from vitpareto.search.training.snapshots import Snapshot
from vitpareto.search.trials.trial import Task, Worker

#: seconds between two looks at how far preparations are
LOOK_EVERY_S = 10.0


def prepare_shared(
    names: Iterable[str], task: Task, cpus: float, gpus: float, say: Callable[[str], None]
) -> Task:
    """Prepare what the trials of these methods share, each on a worker of its own; the task with
    NViT's snapshots in it. A study's record of them is kept in its folder.

    UserError, with the reason, where one cannot be prepared; what it kept stays for the next time.
    """
    training = task.training
    wanted = [n for n in names if methods.get(n).trained_once and training and training.settings(n)]
    if training is None or not wanted:
        return task
    say(f"preparing {' and '.join(wanted)}, once for all trials")
    told: dict[str, str] = {}
    remote = ray.remote(_prepare).options(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    shared = ray.put(task)
    waiting = {remote.remote(shared, name): name for name in wanted}
    done: dict[str, Preparation] = {}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_EVERY_S)
        if not ready:
            for name in waiting.values():
                if (line := _heard(task.study, name)) and told.get(name) != line:
                    told[name] = line
                    say(f"{name}: {line}")
            continue
        name = waiting.pop(ready[0])
        try:
            done[name] = ray.get(ready[0])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (BadInput, FloatingPointError)):
                raise UserError(
                    f"{name} cannot be prepared: {cause}. What it came to is kept; other settings, "
                    f"or methods without {name}, begin anew"
                ) from error
            raise
        made = done[name]
        say(f"{name}: {'prepared' if made.fresh else 'found; it was prepared'} in "
            f"{made.seconds:.0f} s ({made.key})")  # fmt: skip
    record(task.study, done.values())
    return with_snapshots(task)


def _prepare(task: Task, name: str) -> Preparation:
    """On a worker."""
    trainer = Worker.open(task).trainer
    path = _line(task.study, name)
    path.parent.mkdir(exist_ok=True)
    trainer.heard = lambda line: write_atomic(path, line)
    try:
        return trainer.heads(trainer.dense) if name == "tnt" else trainer.snapshots()
    finally:
        path.unlink(missing_ok=True)


def _line(study: StudyFolder, name: str) -> Path:
    """Where a worker says how far it is."""
    return study.folder / "training" / f"{name}.txt"


def _heard(study: StudyFolder, name: str) -> str:
    try:
        return _line(study, name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def record(study: StudyFolder, made: Iterable[Preparation]) -> None:
    """Keep in the study what its trials share, and the weights of NViT's snapshots.

    What the study made stays its own, however often it is found again.
    """
    before = {p["key"]: p for p in study.preparations()}
    entries = []
    for one in made:
        for snapshot in one.outcome.get("snapshots", ()):
            study.artifacts.adopt(snapshot["weights"], one.artifacts)
        entries.append(before.get(one.key) or {**one.plain(), "outcome": one.outcome})
    study.write_preparations(entries)


def snapshots_of(study: StudyFolder) -> dict[float, Snapshot]:
    """NViT's snapshots by target, as recorded; {} where there are none."""
    return {
        s["target"]: Snapshot(s["weights"], s["widths"], s["reached"], entry["key"])
        for entry in study.preparations()
        for s in entry["outcome"].get("snapshots", ())
    }


def with_snapshots(task: Task) -> Task:
    """The task with the snapshots that its study has recorded."""
    if task.training is None:
        return task
    return replace(task, training=replace(task.training, snapshots=snapshots_of(task.study)))


def reuse(study: StudyFolder, results: Sequence[TrialResult]) -> list[str]:
    """A line a preparation: how long it took, who made it, and how many trials it served."""
    lines, uses = [], Counter[tuple[str, str]]()
    made = {(entry["method"], entry["key"]): entry for entry in study.preparations()}
    for result in results:
        for use in result.provenance.get("prepared", ()):
            uses[use["method"], use["key"]] += 1
            known = made.setdefault((use["method"], use["key"]), use)
            if use["fresh"] and not known["fresh"]:  # a trial made what the others found
                made[use["method"], use["key"]] = use
    for (method, key), entry in made.items():
        by = "by this study" if entry["fresh"] else "before this study"
        on, count = entry.get("on"), uses[method, key]
        lines.append(
            f"{method}{f' on {on}' if on else ''} was prepared once ({entry['seconds']:.0f} s, "
            f"{by}) and served {count} trial{'' if count == 1 else 's'}"
        )
    return lines
