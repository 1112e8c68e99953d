"""MLflow as a mirror of the study folder, which is the truth: kept while searching, or rebuilt.

One parent run a study, one child a trial, in the experiment `vitpareto/NAME`. `Tracker` listens to
the searcher and sends from a thread of its own; a server that is slow, down or wrong costs the
search microseconds a trial and one line. `sync` makes a server equal to the study from nothing.

STORE/mlflow.db, STORE/mlartifacts   where no server is named
STORE/NAME/tracking.json   the study's id on servers, and why it ended
STORE/NAME/outbox.jsonl    what servers are still owed, a line each with its server; what is sent is
                           read from the study, and a server's lines go once it has everything
STORE/NAME/tracking.lock   held (flock) by the one process that sends
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpareto.methods import Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.locks import LockTimeout, locked
from vitpareto.search.study.certificates import measured, order_note, why_not
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.front_table import FrontRow
from vitpareto.search.study.job import trials_in_all
from vitpareto.search.study.objectives import OBJECTIVES, objectives_named
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.verdict import verdict
from vitpareto.search.tracking import client as mlflow_client
from vitpareto.search.tracking import runs as mlflow_runs
from vitpareto.search.tracking.runs import (
    CurvePoint,
    Mirror,
    RunSpec,
    curve_of,
    note_that_fits,
    ranks_of,
)

if TYPE_CHECKING:  # `sync` need not wait for Ray
    from vitpareto.search.trials.searcher import Tally

#: seconds between attempts on a server that failed: doubled each time, up to the last
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
#: seconds after which the end of a search waits no longer for a server, and says that it waits
PATIENCE_S, TELL_AFTER_S = 45.0, 5.0
#: seconds between two reports of the hypervolume, so that it is not a fourth call a trial
CURVE_EVERY_S = 2.0
#: seconds `sync` waits for a search that has just given up, whose last request must time out first
LOCK_WAIT_S = 15.0

log = logging.getLogger("vitpareto")
Say = Callable[[str], None]


@dataclass(frozen=True)
class SyncReport:
    """How many runs `sync` touched, the study's own included. `closed`: were left RUNNING;
    `removed`: of trials the study has not, or made twice; `refused`: trial -> the server's reason.
    """

    created: int = 0
    updated: int = 0
    closed: int = 0
    unchanged: int = 0
    removed: int = 0
    refused: dict[int | None, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """What the study's own run shows beside its runs: files by artifact name, the front's rows
    (plain dicts), and a note in Markdown ("": one with the front is written).
    """

    artifacts: Mapping[str, Path] = field(default_factory=dict)
    table: Sequence[FrontRow] = ()
    note: str = ""


def tracking_uri(folder: StudyFolder, uri: str | None) -> str:
    """The server named (None: what MLflow's own MLFLOW_TRACKING_URI names), or for "store", and
    where nothing is named, SQLite in the study's store (an absolute path).
    """
    named = uri or os.environ.get("MLFLOW_TRACKING_URI") or "store"
    return named if named != "store" else mlflow_client.store_uri(folder.folder.parent)


# ------------------------------------------------------------------------------- beside the study


@dataclass(frozen=True)
class _Mark:
    """The study's id on servers, made once; `ended`: why its last tracked search ended ("": it runs
    or was broken off), with as many `trials` on disk: with more of them, it is not true any more.
    """

    id: str
    ended: str = ""
    trials: int = 0

    @classmethod
    def read(cls, folder: StudyFolder) -> _Mark:
        with contextlib.suppress(OSError, ValueError, TypeError):
            found = json.loads((folder.folder / "tracking.json").read_text(encoding="utf-8"))
            if found["id"]:
                return cls(**found)
        made = cls(uuid.uuid4().hex)
        made.write(folder)
        return made

    def write(self, folder: StudyFolder) -> None:
        write_atomic(folder.folder / "tracking.json", json.dumps(asdict(self)))


def _set_ended(folder: StudyFolder, why: str) -> None:
    mark = _Mark.read(folder)
    now = replace(mark, ended=why, trials=folder.durable_trials() if why else 0)
    if mark != now:
        now.write(folder)


def _settle_outbox(folder: StudyFolder, server: str) -> None:
    """Drop the lines owed to this server, which has everything now. `server`: as `shown_uri`."""
    with (
        contextlib.suppress(FileNotFoundError),
        open(folder.folder / "outbox.jsonl", "r+", encoding="utf-8") as outbox,
    ):
        kept = [line for line in outbox if f'"to": {json.dumps(server)}' not in line]
        outbox.seek(0)
        outbox.truncate()
        outbox.writelines(kept)


def _sending(folder: StudyFolder, wait_s: float = 0.0) -> AbstractContextManager[None]:
    """One process sends; LockTimeout where another still does after `wait_s`."""
    return locked(folder.folder / "tracking.lock", timeout_s=wait_s)


# ------------------------------------------------------------------------------ study -> server


def connect(folder: StudyFolder, uri: str) -> Mirror:
    """The study's runs on a server. Raises whatever MLflow raises."""
    store, study_id = folder.folder.parent, _Mark.read(folder).id
    own = uri == mlflow_client.store_uri(store)
    if own:
        mlflow_client.ensure_database(store)
    # a server knows its own place for files
    local = not uri.startswith(("http://", "https://", "databricks"))
    artifacts = mlflow_client.artifacts(store).as_uri() if local else None
    return Mirror(mlflow_client.open_client(uri), folder.name, study_id, artifacts, own)


def _study_run(
    folder: StudyFolder,
    results: Sequence[TrialResult],
    *,
    status: str,
    reason: str,
    note: str,
) -> RunSpec:
    """The parent: what the study's numbers depend on as parameters, versions and state as tags."""
    identity, job = folder.identity(), folder.job()
    params = {
        k: (v if isinstance(v, str) else json.dumps(v))[: mlflow_runs.LONGEST_PARAM]
        for k, v in identity.items()
        if v is not None and v != {}
    }
    for key in ("model", "data"):
        if key in job:
            params.setdefault(key, str(job[key]))
    front = front_of(results, objectives_named(folder.objectives))
    state = {"FINISHED": "finished", "RUNNING": "running"}.get(status, "stopped")
    tags = {
        "study": folder.name,
        "state": state,
        "reason": reason,
        "front": str(len(front)),
        "mlflow.note.content": note_that_fits(
            note
            or study_note(folder, front, "" if status == "RUNNING" else _verdict(folder, results))
        ),
    }
    versions: dict[str, str] = next(
        (r.provenance["versions"] for r in results if "versions" in r.provenance), {}
    )
    tags |= {f"version.{name}": str(version) for name, version in versions.items()}
    now = int(1e3 * time.time())
    return RunSpec(
        trial=None,
        name=folder.name,
        status=status,
        params=params,
        tags=tags,
        begin_ms=min((r.begun_ms for r in results), default=now),
        end_ms=max((r.ended_ms for r in results), default=now),
    )


def _verdict(folder: StudyFolder, results: Sequence[TrialResult]) -> str:
    said = verdict(results, folder.objectives)
    return "" if said is None else str(said)


def study_note(folder: StudyFolder, front: Sequence[TrialResult], judged: str = "") -> str:
    """Markdown: the verdict, the front, cheapest first as given, what the held-out images say of
    its order, and how to get a model out of it.

    judged: the verdict; "" while there is none, or the search goes on.
    """
    wanted = {*folder.objectives, "top1", "gmacs", "latency_ms"}  # more is in the runs
    shown = [
        o
        for o in OBJECTIVES.values()
        if o.name in wanted and any(o.name in r.values for r in front)
    ]
    certified = any(r.certified is not None for r in front)
    head = ["trial", *(f"{o.name} ({o.unit})" for o in shown)]
    head += ["held-out top1 (95 % for all at once)"] if certified else []
    head.append("recipe")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in front:
        values = [f"{r.values[o.name]:.4g}" if o.name in r.values else "" for o in shown]
        if certified:
            own = r.certified
            values.append("" if own is None else f"{own.top1:.4g} ({own.low:.4g}–{own.high:.4g})")
        lines.append(f"| {r.trial} | {' | '.join(values)} | {_recipe_line(r)} |")
    name = folder.name
    notes = [order_note(front), why_not(folder, front) if judged else ""]
    return "\n".join(
        [
            *([f"**{judged}**", ""] if judged else ()),
            f"**{name}**: {len(front)} trials on the front"
            + (" (`tags.pareto = 'true'` shows their runs)." if front else " so far."),
            "",
            *(lines if front else ()),
            "",
            *(line for note in notes if note for line in (f"{note[0].upper()}{note[1:]}.", "")),
            f"Export: `vitpareto export {name} --knee --out bundle/`, "
            f"or `--trial N`, `--max-gmacs G`. This page: `vitpareto sync {name}` rebuilds it.",
        ]
    )


def _recipe_line(result: TrialResult) -> str:
    return str(Recipe.from_dict(result.recipe)).replace("|", "\\|")


def _reconcile(
    mirror: Mirror,
    folder: StudyFolder,
    *,
    running: bool = False,
    ended: str = "",
    page: Page | None = None,
) -> SyncReport:
    """Make the server's runs those of the study, touching what differs. Raises what MLflow does.

    page None: files and table on the server stay as they are.
    """
    results = measured(folder)
    objectives = folder.objectives
    status = "RUNNING" if running else "FINISHED" if ended else "KILLED"
    mirror.put_views(objectives)
    counts: Counter[str] = Counter()

    def put(spec: RunSpec) -> str:
        known = mirror.runs.get(spec.trial)
        was_open = known is not None and known.status == "RUNNING"
        outcome = mirror.put(spec)
        if was_open and spec.status != "RUNNING" and outcome == "updated":
            outcome = "closed"
        counts[outcome] += 1
        return outcome

    parent = _study_run(
        folder, results, status=status, reason=ended, note=page.note if page else ""
    )
    own = ""
    if running or mirror.parent is None:
        own = put(replace(parent, status="RUNNING"))
    for spec in mlflow_runs.runs_of(
        results,
        study=folder.name,
        objectives=objectives,
        recovered=measured(folder, recovered=True),
    ):
        put(spec)
    trials: set[int | None] = {None, *(r.trial for r in results)}
    counts["closed"] += mirror.close(keep=trials)
    removed = mirror.duplicates + (0 if running else mirror.remove(keep=trials))
    steps = mirror.steps()
    points = [p for p in curve_of(results, objectives) if p.step not in steps]
    mirror.log_curve(points)
    changed = bool(points)
    if page is not None:
        changed |= _put_page(mirror, folder, page)
    # last: whoever sees the study's run ended shall find it whole
    if own == "created":
        mirror.put(parent)
    elif not own:
        own = put(parent)
    if own == "unchanged" and changed:
        counts["unchanged"] -= 1
        counts["updated"] += 1
    return SyncReport(
        counts["created"], counts["updated"], counts["closed"], counts["unchanged"], removed,
        dict(mirror.refused),
    )  # fmt: skip


def _put_page(mirror: Mirror, folder: StudyFolder, page: Page) -> bool:
    files = {name: path for name, path in page.artifacts.items() if path.is_file()}
    job = folder.folder / "job.yaml"
    if job.is_file():
        files.setdefault("job.yaml", job)
    rows = [row.to_json() for row in page.table]
    digest = hashlib.sha256(json.dumps(rows, default=str).encode())
    for name, path in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return mirror.put_artifacts(files, rows, digest.hexdigest())


def sync(folder: StudyFolder, uri: str | None = None, page: Page | None = None) -> SyncReport:
    """Make MLflow equal to the study, from nothing if need be; a second time it changes nothing.

    UserError where the server cannot be reached, or a search is sending to it now.
    """
    where = tracking_uri(folder, uri)
    try:
        with _sending(folder, LOCK_WAIT_S):
            mark = _Mark.read(folder)
            done, wanted = folder.durable_trials(), trials_in_all(folder.job())
            # a search that was not tracked says nothing of its end: its trials do
            measured = f"{done} trials measured" if wanted and done >= wanted else ""
            ended = mark.ended if mark.trials == done else measured
            mirror = connect(folder, where)
            # nobody else sends now, so nobody would end a run that said RUNNING, searched or not
            report = _reconcile(mirror, folder, ended="" if folder.running else ended, page=page)
            _settle_outbox(folder, shown_uri(where))
            return report
    except LockTimeout:
        raise UserError(
            f"study {folder.name} is being sent to MLflow by its search; wait until that ends"
        ) from None
    except UserError:
        raise
    except Exception as error:
        said = f"MLflow at {shown_uri(where)} failed: {_brief(error)}"
        if where == mlflow_client.store_uri(folder.folder.parent):
            said += "; it holds nothing that the studies do not: move the file away, sync again"
        raise UserError(said) from error


def shown_uri(uri: str) -> str:
    """The address without a password."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


def _brief(error: Exception) -> str:
    root: BaseException = error
    while inner := root.__cause__ or root.__context__:
        root = inner
    if isinstance(root, OSError) and root.strerror:
        return root.strerror  # what four libraries wrapped: "Connection refused"
    text = shown_uri(str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


# ----------------------------------------------------------------------------- while searching


@dataclass(frozen=True)
class _Heard:
    """A result became durable; the front, hypervolume and number of results just then."""

    trial: int
    front: tuple[int, ...]
    hypervolume: float
    step: int


@dataclass(frozen=True)
class _End:
    """The search is over: "" if it was broken off."""

    ended: str
    page: Page | None


class Tracker:
    """A searcher's hook that keeps MLflow up to date, and never stops, slows or breaks the search.

        with Tracker(folder, uri) as tracker:
            run.search(prepared, ..., hooks=[tracker.hear])
            tracker.finish(artifacts, table, note, ended=tally.ended)

    Leaving the block without `finish` ends the study's run as KILLED. `say` gets one line when a
    server stops answering, one when it answers again, and one if something is still owed at the
    end.
    """

    def __init__(self, folder: StudyFolder, uri: str | None = None, *, say: Say = log.warning):
        self.folder, self.uri, self.say = folder, tracking_uri(folder, uri), say
        self._todo: deque[_Heard | _End] = deque()
        self._guard = threading.Lock()  # of the outbox file and the mark; held for instants
        self._wake, self._hurry, self._over = (threading.Event() for _ in range(3))
        self._thread: threading.Thread | None = None
        self._outbox: int | None = None
        self._mirror: Mirror | None = None
        self._curve: list[CurvePoint] = []
        self._steps: set[int] = set()
        self._curve_sent = 0.0
        self._ending = self._given_up = False
        self._down = ""
        self._failed_began = 0.0  # when the last attempt that failed had begun
        self._failures = 0

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the search's side: microseconds ------------------------------------------------------

    def hear(self, result: TrialResult | None, tally: Tally) -> None:
        """The searcher's hook. The result is on disk already, so an outbox line need not be synced
        to it: what a power cut takes, the next start or `sync` finds.
        """
        self._start()
        if result is None:
            return
        heard = _Heard(result.trial, tally.front, tally.hypervolume, tally.finished + tally.failed)
        self._owe(heard, {"trial": result.trial, "step": heard.step})

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def _owe(self, entry: _Heard | _End, line: dict[str, Any]) -> None:
        with self._guard:
            try:
                if self._outbox is None:
                    path = self.folder.folder / "outbox.jsonl"
                    self._outbox = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                owed = {"to": shown_uri(self.uri), **line}
                os.write(self._outbox, json.dumps(owed).encode() + b"\n")
            except OSError as error:  # the study itself will have more to say about its disk
                log.debug("outbox: %s", error)
            self._todo.append(entry)
        self._wake.set()

    @property
    def owed(self) -> int:
        """Entries that the server has not got yet."""
        return len(self._todo)

    # -- the end ----------------------------------------------------------------------------

    def finish(
        self,
        artifacts: Mapping[str, Path] | None = None,
        table: Sequence[FrontRow] = (),
        note: str = "",
        *,
        ended: str = "",
    ) -> bool:
        """Send what is left, with the study's page; whether the server has everything now.

        ended: why the search is over (`Tally.ended`); "": it was broken off, the run ends KILLED.
        Waits at most PATIENCE_S, for a server that does not answer about 12 s.
        """
        return self._finish(_End(ended, Page(artifacts or {}, table, note)))

    def close(self) -> None:
        """End without a page, as broken off; nothing after `finish`."""
        if not self._ending and self._thread is not None:
            self._finish(_End("", None))

    def _finish(self, end: _End) -> bool:
        assert not self._ending, "a tracker finishes once"
        with self._guard:
            self._ending = True
            try:
                _set_ended(self.folder, end.ended)
            except OSError as error:
                log.debug("tracking.json: %s", error)
        began, failures, was_down = time.monotonic(), self._failures, bool(self._down)
        self._owe(end, {"ended": end.ended})
        self._start()
        self._hurry.set()
        told = False
        while not self._over.wait(0.02):
            waited = time.monotonic() - began
            failed = self._failures > failures and (was_down or self._failed_began >= began)
            if failed or waited > PATIENCE_S:
                break
            if waited > TELL_AFTER_S and not told:
                told = True
                self.say(f"sending the rest to MLflow at {shown_uri(self.uri)}")
        if self._over.is_set():
            return True
        self._given_up = True
        self._wake.set()
        self.say(
            f"MLflow at {shown_uri(self.uri)} is owed {len(self._todo)} entries; they are in "
            f"{self.folder.folder / 'outbox.jsonl'}: vitpareto sync {self.folder.name} sends them"
        )
        return False

    # -- the thread's side -------------------------------------------------------------------

    def _work(self) -> None:
        pause = FIRST_PAUSE_S
        with contextlib.ExitStack() as held:
            locked = False
            while not self._given_up:
                began = time.monotonic()
                try:
                    if not locked:
                        held.enter_context(_sending(self.folder))
                        locked = True
                    self._send()
                except Exception as error:
                    self._mirror = None  # what it knows of the server may be wrong now
                    self._complain(error)
                    self._failed_began = began
                    self._failures += 1
                    self._hurry.wait(pause)
                    pause = min(2 * pause, LAST_PAUSE_S)
                    continue
                pause = FIRST_PAUSE_S
                if self._settled():
                    self._over.set()
                    return
                # with points of the curve held back, wake again to send them
                self._wake.wait(CURVE_EVERY_S if self._curve else None)
                self._wake.clear()

    def _settled(self) -> bool:
        """Nothing is owed: empty the outbox. True if that was the end."""
        with self._guard:
            if self._todo:
                self._wake.set()
                return False
            if self._outbox is not None and not self._curve:
                _settle_outbox(self.folder, shown_uri(self.uri))
            if not self._ending:
                return False
            if self._outbox is not None:
                os.close(self._outbox)
                self._outbox = None
            return True

    def _complain(self, error: Exception) -> None:
        said = _brief(error)
        if not self._down:
            self.say(
                f"MLflow at {shown_uri(self.uri)} cannot be used now ({said}); the search goes on, "
                "what it is owed waits in the outbox"
            )
        self._down = said

    def _send(self) -> None:
        """Everything that is owed. An entry leaves the queue once the server has it."""
        if self._mirror is None:
            self._begin()
        mirror = self._mirror
        assert mirror is not None
        if self._down:
            self._down = ""
            self.say(f"MLflow at {shown_uri(self.uri)} answers again")
        while self._todo and not self._given_up:
            entry = self._todo[0]
            if isinstance(entry, _End):
                self._curve.clear()  # all of it is computed anew
                report = _reconcile(mirror, self.folder, ended=entry.ended, page=entry.page)
                self._say_refused(report.refused)
            else:
                self._send_trial(mirror, entry)
            self._todo.popleft()
        if self._curve and time.monotonic() - self._curve_sent >= CURVE_EVERY_S:
            mirror.log_curve(self._curve)
            self._curve.clear()
            self._curve_sent = time.monotonic()

    def _begin(self) -> None:
        """Connect, close what an earlier driver left open, and send what it had not sent."""
        with self._guard:
            if not self._ending:
                _set_ended(self.folder, "")
        mirror = connect(self.folder, self.uri)
        self._mirror = mirror
        self._curve.clear()
        _reconcile(mirror, self.folder, running=True)
        self._steps = mirror.steps()

    def _send_trial(self, mirror: Mirror, heard: _Heard) -> None:
        result = self.folder.result(heard.trial)
        if result is None:
            return  # its file is gone: then it is no part of the study any more
        if heard.trial not in mirror.runs:  # else it was on disk when the thread began
            front = heard.trial in heard.front
            mirror.put(
                mlflow_runs.trial_run(
                    result, study=self.folder.name, front=front, rank=0 if front else None
                )
            )
        if heard.step not in self._steps:
            self._steps.add(heard.step)
            self._curve.append(CurvePoint(heard.step, heard.hypervolume, result.ended_ms))
        if len(self._todo) == 1:  # of several that wait, only the last front is still true
            self._retag(mirror, set(heard.front))

    def _retag(self, mirror: Mirror, front: set[int]) -> None:
        """Only runs that entered or left the front since the server was last told."""
        told = mirror.on_front()
        left = told - front
        if left:
            ranks = ranks_of(self.folder.results(), self.folder.objectives)
            for trial in sorted(left):
                # ranks are of now, the front is of then: what left it cannot come back
                mirror.retag(trial, front=False, rank=max(1, ranks.get(trial, 1)))
        for trial in sorted(front - told):
            mirror.retag(trial, front=True, rank=0)

    def _say_refused(self, refused: Mapping[int | None, str]) -> None:
        if refused:
            trial, reason = next(iter(refused.items()))
            self.say(f"MLflow refused {len(refused)} runs; trial {trial}: {reason[:200]}")
