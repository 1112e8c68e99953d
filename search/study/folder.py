"""A study on disk: one folder that is the whole truth, and the rules that keep it so.

STORE/NAME/study.json     what the numbers depend on; a study refuses to mix
STORE/NAME/job.yaml       the job, as last asked for
STORE/NAME/model.safetensors   the dense weights, mapped by every worker
STORE/NAME/optuna.journal Optuna's storage, or storage.json, which names the database that is
STORE/NAME/trials/*.json  one result a trial, in place before anybody hears of it
STORE/NAME/by_key/*.json  the same files by candidate, so that nothing is measured twice
STORE/NAME/latency.json   latencies of the front
STORE/NAME/certified/*.json   the front on the held-out images, a result each
STORE/NAME/weights/*.safetensors   what was trained, by content hash: recipes name them
STORE/NAME/training/KEY/  trainings in progress, by candidate; gone once its result is there
STORE/NAME/prepared.json  preparations that the study's trials share
STORE/NAME/recovered/*.json   the front's recipes after fine-tuning, a result each
STORE/NAME/pictures/*.png what the front's recipes keep of some images, drawn once
STORE/NAME/explorer.html  the study as a page (`dashboards.explorer_page`)
STORE/NAME/lock           held (flock) by the one driver; the kernel frees it if the driver dies
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitpareto.methods.engine.errors import nearest
from vitpareto.search.errors import UserError
from vitpareto.search.files.atomic import write_atomic
from vitpareto.search.files.locks import LockTimeout, is_locked, locked
from vitpareto.search.files.object_store import ObjectStore, store_folder
from vitpareto.search.files.write_through import (
    fetch_if_missing,
    list_files,
    object_store_of,
    refresh,
)
from vitpareto.search.measure.latency import Latency
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.study.results import TrialResult

SCHEMA = 1
#: `is_locked` holds the lock for an instant, a driver as long as it runs
LOCK_TIMEOUT_S = 0.3


def studies_in(store: Path) -> tuple[str, ...]:
    """Names of the studies in a store."""
    remote = object_store_of(store)
    if isinstance(remote, ObjectStore):
        return remote.list_folders(store)
    if not store.is_dir():
        return ()
    return tuple(sorted(p.parent.name for p in store.glob("*/study.json")))


@dataclass(frozen=True)
class StudyFolder:
    """One study's files. Frozen and small: workers carry it."""

    folder: Path

    @classmethod
    def open(cls, store: str, name: str) -> StudyFolder:
        """A study that is there or not yet; one in object storage as it stands now."""
        root = store_folder(store)
        remote = object_store_of(root)
        if isinstance(remote, ObjectStore):
            remote.download_tree(root / name)
        return cls(root / name)

    @classmethod
    def find(cls, store: str | Path, name: str) -> StudyFolder:
        """An existing study; UserError with the nearest name if there is none, or where a newer
        version wrote it.
        """
        there = cls.open(str(store), name)
        if not there.exists:
            known = studies_in(there.folder.parent)
            raise UserError(f"there is no study {name!r} in {store}{nearest(name, known)}")
        there.identity()
        return there

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def store(self) -> str:
        """The store that it is in, as a job names it."""
        remote = object_store_of(self.folder)
        return remote.url if isinstance(remote, ObjectStore) else str(self.folder.parent)

    def publish(self) -> None:
        """Pages and pictures, which are drawn and not durable, into the object storage that the
        study is kept in; nothing where it is just a folder.
        """
        remote = object_store_of(self.folder)
        if isinstance(remote, ObjectStore):
            remote.upload_tree(self.folder)

    @property
    def exists(self) -> bool:
        # not Path.is_file: that raises where a folder above may not be entered
        return os.path.isfile(self.folder / "study.json")

    @property
    def journal(self) -> Path:
        return self.folder / "optuna.journal"

    @property
    def database(self) -> Path:
        """Which database holds Optuna's trials, where it is not the journal."""
        return self.folder / "storage.json"

    @property
    def weights(self) -> Path:
        path = self.folder / "model.safetensors"
        fetch_if_missing(path)  # fetched, where the store is in object storage
        return path

    @property
    def artifacts(self) -> WeightStore:
        """Trained weights, by digest."""
        return WeightStore(self.folder / "weights")

    def picture(self, trial: int) -> Path:
        """Where the token picture of a trial lies, once it is drawn."""
        return self.folder / "pictures" / f"{trial:06d}.png"

    def training(self, key: str) -> Path:
        """Where a candidate's training keeps what it needs to resume, by `Recipe.key` as asked."""
        return self.folder / "training" / key

    def create(self) -> None:
        """Make the folder and prove that it can be written; UserError if not."""
        try:
            for sub in ("trials", "by_key"):
                (self.folder / sub).mkdir(parents=True, exist_ok=True)
            # a name of its own: another driver may be asking the same
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"the store cannot be written: {error.filename or self.folder}: {error.strerror}"
            ) from error

    # -- what it depends on ------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What the study's numbers depend on, with its schema; UserError if unreadable or newer."""
        try:
            found = json.loads((self.folder / "study.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"study {self.name}: study.json cannot be read: {error}") from error
        schema = found.get("schema") if isinstance(found, dict) else None
        if not isinstance(schema, int):
            raise UserError(f"study {self.name}: study.json names no schema: it is not ours")
        if schema > SCHEMA:
            raise UserError(
                f"study {self.name} has schema {schema}, this version reads up to {SCHEMA}"
            )
        return found

    @property
    def untouched(self) -> bool:
        """Nothing was measured or asked for here yet, so there is nothing to mix with."""
        asked = self.journal.exists() or self.database.exists()
        return not asked and not any((self.folder / "trials").glob("[0-9]*"))

    def settle(self, identity: dict[str, Any]) -> None:
        """Write the identity of a new study, or refuse to mix (`check`)."""
        if self.exists:
            self.identity()  # one of a newer schema is refused, not overwritten
        if not self.exists or self.untouched:
            text = json.dumps({"schema": SCHEMA, **identity}, indent=1)
            write_atomic(self.folder / "study.json", text)
            return
        self.check(identity)

    def check(self, identity: dict[str, Any]) -> None:
        """UserError naming what differs from the study that is there, if one is."""
        if not self.exists:
            return
        before = self.identity()
        if self.untouched:
            return
        identity = json.loads(json.dumps({"schema": SCHEMA, **identity}))
        if said := _differences(before, identity):
            raise UserError(
                f"study {self.name} exists with other settings, and numbers are not mixed: {said}. "
                "Use another --name, or leave these settings as they were"
            )

    def job(self) -> dict[str, Any]:
        path = self.folder / "job.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the study searches by."""
        return tuple(self.job().get("objectives") or ("top1", "gmacs"))

    def write_job(self, job: dict[str, Any]) -> None:
        write_atomic(self.folder / "job.yaml", yaml.safe_dump(job, sort_keys=False))

    # -- one driver --------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Held by the driver; a second one is refused with a UserError."""
        path = self.folder / "lock"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path, timeout_s=LOCK_TIMEOUT_S))
            except LockTimeout:
                raise UserError(
                    f"study {self.name} is being searched by another process; wait, or stop it"
                ) from None
            except OSError as error:
                raise UserError(f"the store cannot lock files: {path}: {error.strerror}") from error
            store = object_store_of(self.folder)
            if store is not None:
                stack.enter_context(store.claim(self.folder))
            yield

    @property
    def running(self) -> bool:
        """Whether a driver holds the study now."""
        return is_locked(self.folder / "lock")

    # -- results -----------------------------------------------------------------------------

    def write(self, result: TrialResult, epoch: str | None = None) -> None:
        """Make a result durable. `epoch`: the driver's session; a worker of an older one is late,
        its trial is running again elsewhere, and it must not write (StaleWorker).
        """
        text = json.dumps(dataclasses.asdict(result))
        path = self.folder / "trials" / f"{result.trial:06d}.json"
        if epoch is not None and self.epoch() != epoch:
            raise StaleWorker(f"trial {result.trial} belongs to an earlier run of {self.name}")
        write_atomic(path, text)
        if result.state != "failed":
            by_key = self.folder / "by_key" / f"{result.key}.json"
            if object_store_of(by_key) is not None:
                if not fetch_if_missing(by_key):
                    write_atomic(by_key, text)
                return
            try:
                os.link(path, by_key)
            except FileExistsError:
                pass  # the first measurement of a candidate is the one that counts
            except OSError:  # a file system without hard links
                write_atomic(by_key, text)

    def results(self) -> list[TrialResult]:
        """All durable results, by trial number."""
        return [_result(path) for path in list_files(self.folder / "trials", "[0-9]*.json")]

    def durable_trials(self) -> int:
        """How many results are durable."""
        return len(list_files(self.folder / "trials", "[0-9]*.json"))

    def result(self, trial: int) -> TrialResult | None:
        path = self.folder / "trials" / f"{trial:06d}.json"
        return _result(path) if fetch_if_missing(path) else None

    def known(self, key: str) -> TrialResult | None:
        """The measurement of this candidate, in full or stopped early, if there is one."""
        path = self.folder / "by_key" / f"{key}.json"
        return _result(path) if fetch_if_missing(path) else None

    def epoch(self) -> str:
        refresh(self.folder / "epoch")
        try:
            return (self.folder / "epoch").read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def start_epoch(self, epoch: str) -> None:
        """Called by a driver that holds the lock: from now on only its workers may write."""
        write_atomic(self.folder / "epoch", epoch)

    # -- what trials share -----------------------------------------------------------------------

    def preparations(self) -> list[dict[str, Any]]:
        """The preparations made or found before the trials began, as `Preparation.plain` gave."""
        path = self.folder / "prepared.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def write_preparations(self, preparations: list[dict[str, Any]]) -> None:
        write_atomic(self.folder / "prepared.json", json.dumps(preparations, indent=1))

    # -- the front, recovered ----------------------------------------------------------------------

    def recovery(self) -> dict[str, Any] | None:
        """What the study was recovered with; None where it was not."""
        path = self.folder / "recovered" / "recovery.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def settle_recovery(self, settings: dict[str, Any]) -> None:
        """Write what a recovery depends on, or refuse to mix two."""
        folder = self.folder / "recovered"
        settings = json.loads(json.dumps(settings))
        before = self.recovery()
        if before is None or not any(folder.glob("[0-9]*.json")):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "recovery.json", json.dumps(settings, indent=1))
        elif said := _differences(before, settings):
            raise UserError(
                f"study {self.name} was recovered with other settings, and numbers are not mixed: "
                f"{said}. Leave them as they were, or remove {folder} to begin anew"
            )

    def recovered(self) -> list[TrialResult]:
        """The recovered trials, under their own numbers."""
        return [_result(path) for path in list_files(self.folder / "recovered", "[0-9]*.json")]

    def write_recovered(self, result: TrialResult) -> None:
        path = self.folder / "recovered" / f"{result.trial:06d}.json"
        write_atomic(path, json.dumps(dataclasses.asdict(result)))

    # -- the front on held-out images --------------------------------------------------------------

    def _certified(self, recovered: bool) -> Path:
        return self.folder / "recovered" / "certified" if recovered else self.folder / "certified"

    def certification(self, recovered: bool = False) -> dict[str, Any] | None:
        """Which images the front was certified on, and which trials; None where it was not."""
        path = self._certified(recovered) / "certification.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_certification(self, record: dict[str, Any], recovered: bool = False) -> None:
        folder = self._certified(recovered)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "certification.json", json.dumps(record))

    def certified(self, recovered: bool = False) -> list[TrialResult]:
        """The trials as measured on the held-out images, under their own numbers."""
        return [_result(path) for path in list_files(self._certified(recovered), "[0-9]*.json")]

    def write_certified(self, result: TrialResult, recovered: bool = False) -> None:
        path = self._certified(recovered) / f"{result.trial:06d}.json"
        write_atomic(path, json.dumps(dataclasses.asdict(result)))

    # -- latencies of the front ----------------------------------------------------------------

    def latencies(self) -> dict[int, Latency]:
        path = self.folder / "latency.json"
        if not path.is_file():
            return {}
        raw = json.loads(path.read_text(encoding="utf-8"))
        return {int(k): Latency.from_json(v) for k, v in raw.items()}

    def write_latencies(self, latencies: dict[int, Latency]) -> None:
        plain = {str(k): v.to_json() for k, v in sorted(latencies.items())}
        write_atomic(self.folder / "latency.json", json.dumps(plain, indent=1))

    def measured(self) -> list[TrialResult]:
        """All results, with the front's latencies written into their values."""
        found = self.latencies()
        out = []
        for result in self.results():
            timed = found.get(result.trial)
            if timed is not None and "latency_ms" not in result.values:
                values = {
                    **result.values,
                    "latency_ms": timed.p50_ms,
                    "images_per_s": timed.images_per_s,
                }
                result = dataclasses.replace(result, values=values)
            out.append(result)
        return out


class StaleWorker(RuntimeError):
    """A worker of an earlier driver tried to write."""


def _result(path: Path) -> TrialResult:
    stored = json.loads(path.read_text(encoding="utf-8"))
    # results of before it was stored: the file's time
    stored.setdefault("ended_ms", path.stat().st_mtime_ns // 10**6)
    return TrialResult(**stored)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """`key was …, now …` for every key that differs; "" for none."""
    return "; ".join(
        f"{k} was {_brief(before.get(k))}, now {_brief(now.get(k))}"
        for k in {**now, **before}
        if before.get(k) != now.get(k)
    )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
