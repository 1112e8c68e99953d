"""A store in object storage (s3://, gs://, or what fsspec knows): written through, read on demand.

Every node keeps a folder of the store on its own disk. What becomes durable there is put into the
storage before anybody hears of it, under the same name; what is asked for and is not there is
fetched. So a study looks like a folder everywhere else, and a node that is lost takes nothing with
it but what was in flight.

Not put there: Optuna's journal (it is filled again from the results,
`search.study.optuna_storage`), MLflow's database (`vitpareto sync` writes it anew), locks and
scratch. Credentials are the environment's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pyarrow import fs

from vitpareto.search.errors import UserError
from vitpareto.search.files import atomic as durable
from vitpareto.search.files.cache import default_cache, locked

#: kept on this node alone, by the beginning of a path's part below its study
OWN = ("optuna.journal", "lock", "ray", "outbox", "tracking.lock", "mlflow", "mlartifacts")
#: fetched only when it is asked for
LATER = ("model.safetensors", "weights/", "training/")
#: seconds between two renewals of a driver's claim, and after how many without one it is dead
RENEW_S, DEAD_S = 5.0, 20.0
#: what a storage that is away, or has too much to do, is said to be in
AWAY = ("NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "timed out")
#: seconds for which it is waited for, and between two attempts
PATIENCE_S, AGAIN_S = 900.0, 2.0
#: images fetched at a time
FETCHERS = 16

log = logging.getLogger("vitpareto")
T = TypeVar("T")


def is_remote(store: str) -> bool:
    """Whether a store is an address and no folder."""
    return "://" in store


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """What reads and writes at an address, and the path there. pyarrow's own (S3, GCS), otherwise
    fsspec's. UserError for a scheme that nobody knows, or whose package is missing.
    """
    try:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if url.startswith("s3://") and "?" not in url and endpoint:
            # from_uri would ask Amazon for the bucket's region, whoever's server it is
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            own = fs.S3FileSystem(
                endpoint_override=endpoint,
                region=region or "us-east-1",
                allow_delayed_open=True,  # one request for a small file instead of three
            )
            return own, url.removeprefix("s3://")
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(url)
        return found
    except Exception as error:  # pyarrow's own kinds
        import fsspec

        try:
            other, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as unknown:
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{url} cannot be opened ({why}; {unknown}): accepted are a folder, s3://, gs://, "
                "and the schemes of installed fsspec packages"
            ) from error
        return fs.PyFileSystem(fs.FSSpecHandler(other)), path


def store_folder(store: str) -> Path:
    """The folder of a store on this node; one in object storage is kept there from now on."""
    if not is_remote(store):
        return Path(store)
    remote = Remote(store)
    durable.keep_elsewhere(remote.root, remote)
    return remote.root


@dataclass(frozen=True)
class Remote:
    """A store's address, and this node's folder of it."""

    url: str

    @cached_property
    def root(self) -> Path:
        """This node's folder."""
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return (default_cache() / "stores" / name).absolute()

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        return filesystem(self.url)

    def _at(self, path: Path) -> str:
        return str(PurePosixPath(self._opened[1]) / path.relative_to(self.root).as_posix())

    def keeps(self, path: Path) -> bool:
        """Whether a file of the folder belongs into the storage."""
        parts = path.relative_to(self.root).parts
        below = parts[1] if len(parts) > 1 else parts[0]
        return not below.startswith(OWN)

    # -- one file ----------------------------------------------------------------------------------

    def put(self, path: Path) -> None:
        """A file of the folder into the storage: there whole, or as before. A storage that is away
        is waited for, so that a search pauses instead of losing what it measured.
        """
        if self.keeps(path):
            self._patiently(lambda: self.write(self._at(path), path.read_bytes()))

    def write(self, at: str, content: bytes) -> None:
        """UserError, naming the store, where it does not take it."""
        try:
            _write(self._opened[0], at, content)
        except OSError as error:
            raise UserError(f"the store {self.url} cannot be written: {_short(error)}") from error

    def get(self, path: Path) -> bool:
        """A file of the storage into the folder, replacing what is there; False where none is."""
        content = self._patiently(lambda: self.read(self._at(path)))
        if content is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_bytes(content)
        partial.replace(path)
        return True

    def read(self, at: str) -> bytes | None:
        system = self._opened[0]
        try:
            with system.open_input_stream(at) as opened:
                found: bytes = opened.read()
                return found
        except FileNotFoundError:
            return None
        except OSError as error:
            if system.get_file_info(at).type == fs.FileType.NotFound:
                return None
            raise UserError(f"the store {self.url} cannot be read: {_short(error)}") from error

    def _patiently(self, call: Callable[[], T]) -> T:
        """What `call` gives, tried again for a while where the storage does not answer; what it
        refuses (no such bucket, no permission) is raised at once.
        """
        begin, waited = time.monotonic(), False
        while True:
            try:
                found = call()
            except UserError as error:
                away = any(word in str(error) for word in AWAY)
                if not away or time.monotonic() - begin > PATIENCE_S:
                    raise
                if not waited:
                    log.warning("%s; paused until it answers", error)
                waited = True
                time.sleep(AGAIN_S)
            else:
                if waited:
                    log.warning("the store %s answers again; going on", self.url)
                return found

    # -- a folder ----------------------------------------------------------------------------------

    def names(self, folder: Path, deep: bool = False) -> dict[str, fs.FileInfo]:
        """The files in the storage below a folder, by their path relative to it."""
        system, _ = self._opened
        at = self._at(folder)
        try:
            found = system.get_file_info(fs.FileSelector(at, allow_not_found=True, recursive=deep))
        except OSError as error:
            raise UserError(f"the store {self.url} cannot be read: {_short(error)}") from error
        return {
            str(PurePosixPath(one.path).relative_to(at)): one
            for one in found
            if one.type == fs.FileType.File
        }

    def fetch(self, folder: Path) -> None:
        """What is in the storage of a study and not, or not like that, in its folder; but for what
        is large, which is fetched when it is asked for.
        """
        for name, there in self.names(folder, deep=True).items():
            path = folder / name
            if name.startswith(LATER):
                continue
            # a result never changes once it is written, and is small; others may have changed
            known = path.is_file() and path.stat().st_size == there.size
            if not (known and path.parent.name in ("trials", "by_key")):
                self.get(path)

    def push(self, folder: Path) -> None:
        """What was written below a folder and is not in the storage, or not like that: all."""
        there = self.names(folder, deep=True)
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or not self.keeps(path) or path.name.startswith("."):
                continue
            info = there.get(path.relative_to(folder).as_posix())
            if info is None or info.size != path.stat().st_size or info.mtime_ns < _mtime(path):
                self.put(path)

    def folders(self, folder: Path) -> tuple[str, ...]:
        """The folders in the storage directly below a folder."""
        system, _ = self._opened
        found = system.get_file_info(fs.FileSelector(self._at(folder), allow_not_found=True))
        return tuple(sorted(f.base_name for f in found if f.type == fs.FileType.Directory))

    def drop(self, folder: Path) -> None:
        system, _ = self._opened
        for name in ("", *self.names(folder, deep=True)):
            with contextlib.suppress(OSError):  # itself, where it is a folder
                system.delete_file(self._at(folder / name))

    # -- one driver --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claimed(self, study: Path) -> Iterator[None]:
        """The study is this process's. A driver that is alive renews its claim, and a second one is
        refused with a UserError; a claim that nobody renews is a dead driver's, and is taken over.
        """
        at, mine = self._at(study / "claim.json"), uuid.uuid4().hex
        self._wait_for(at, study)
        self._claim(at, mine)
        time.sleep(1.0)  # two that came at one instant: the later writer has it
        held = self.read(at)
        if held is None or json.loads(held)["driver"] != mine:
            raise self._taken(study, held)
        over = threading.Event()

        def renew() -> None:
            while not over.wait(RENEW_S):
                with contextlib.suppress(UserError):  # the storage may be away for a while
                    self._claim(at, mine)

        renewing = threading.Thread(target=renew, daemon=True, name="claim")
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join()
            with contextlib.suppress(OSError):
                self._opened[0].delete_file(at)

    def _claim(self, at: str, mine: str) -> None:
        claim = {"driver": mine, "host": os.uname().nodename, "at": time.time_ns()}
        self.write(at, json.dumps(claim).encode())

    def _wait_for(self, at: str, study: Path) -> None:
        """Until there is no claim, or one that is not renewed."""
        first = self.read(at)
        if first is None:
            return
        log.warning("%s was being searched: looking whether it still is", study.name)
        end = time.monotonic() + DEAD_S
        while time.monotonic() < end:
            time.sleep(1.0)
            now = self.read(at)
            if now is None:
                return
            if now != first:
                raise self._taken(study, now)

    def _taken(self, study: Path, claim: bytes | None) -> UserError:
        host = json.loads(claim)["host"] if claim else "another node"
        return UserError(
            f"study {study.name} is being searched by another process, on {host}; wait, or stop it"
        )


def _write(system: fs.FileSystem, at: str, content: bytes) -> None:
    """A file, whole; storages that have folders are given them."""
    try:
        stream = system.open_output_stream(at)
    except FileNotFoundError:
        system.create_dir(str(PurePosixPath(at).parent))
        stream = system.open_output_stream(at)
    with stream as out:
        out.write(content)


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def upload(folder: Path, url: str) -> None:
    """The files of a folder under an address."""
    system, at = filesystem(url)
    try:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            there = str(PurePosixPath(at) / path.relative_to(folder).as_posix())
            _write(system, there, path.read_bytes())
    except OSError as error:
        raise UserError(f"{url} cannot be written: {_short(error)}") from error


def check_empty(url: str) -> None:
    """UserError where something lies under an address, or it cannot be read."""
    system, at = filesystem(url)
    try:
        found = system.get_file_info(fs.FileSelector(at, allow_not_found=True))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {_short(error)}") from error
    if found:
        raise UserError(f"{url} is there already: name another place")


def download(url: str, cache: Path) -> Path:
    """What lies under an address, in a folder of this node's cache: fetched where it is not there.

    UserError where nothing lies there, or it cannot be read.
    """
    system, at = filesystem(url)
    folder = cache / "objects" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        found = system.get_file_info(fs.FileSelector(at, allow_not_found=True, recursive=True))
        files = [f for f in found if f.type == fs.FileType.File]
        if not files:
            raise UserError(f"nothing lies under {url}")

        def fetch(info: fs.FileInfo) -> None:
            path = folder / PurePosixPath(info.path).relative_to(at)
            if path.is_file() and path.stat().st_size == info.size:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            with system.open_input_stream(info.path) as opened:
                partial.write_bytes(opened.read())
            partial.replace(path)

        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")), ThreadPoolExecutor(FETCHERS) as pool:
            list(pool.map(fetch, files))
            here = {PurePosixPath(f.path).relative_to(at).as_posix() for f in files}
            for path in [p for p in folder.rglob("*") if p.is_file()]:
                if path.relative_to(folder).as_posix() not in here:
                    path.unlink()  # gone there since
    except OSError as error:
        raise UserError(f"{url} cannot be read: {_short(error)}") from error
    return folder
