"""A store of studies in object storage (s3://, gs://, or a scheme of fsspec).

Every node keeps a local copy of the folder. A write returns when the file is in the object storage
too, under the same name; a file that is missing locally is fetched when it is needed. A study
therefore looks like a folder to all other code, and losing a node loses only what was in progress.

Not stored: Optuna's journal (rebuilt from the results, `search.study.optuna_storage`), MLflow's
database (rebuilt by `vitpareto sync`), locks and scratch files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pyarrow import fs

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files import claims
from vitpareto.search.files.cache import default_cache
from vitpareto.search.files.filesystems import (
    files_below,
    is_remote,
    open_filesystem,
    storage_error,
    write_file,
)
from vitpareto.search.files.write_through import register_object_store

#: kept on this node only, by the start of the path below the study
LOCAL_ONLY = ("optuna.journal", "lock", "ray", "outbox", "tracking.lock", "mlflow", "mlartifacts")
#: fetched when a file is needed, not with the study
ON_DEMAND = ("model.safetensors", "weights/", "training/")
#: results: they never change once written
IMMUTABLE = ("trials", "by_key")
#: seconds for which an unavailable storage is retried, and between two attempts
RETRY_FOR_S, RETRY_INTERVAL_S = 900.0, 2.0

log = logging.getLogger("vitpareto")
T = TypeVar("T")


def store_folder(store: str) -> Path:
    """The local folder of a store. For a URL, the folder is kept in object storage from now on."""
    if not is_remote(store):
        return Path(store)
    remote = ObjectStore(store)
    register_object_store(remote.root, remote)
    return remote.root


@dataclass(frozen=True)
class ObjectStore:
    """A store's URL and this node's folder of it. Implements `write_through.FolderStore`.

    All methods take local paths below `root`, or keys: paths in the storage. They raise UserError,
    with `Code.UNAVAILABLE` if the storage does not answer.
    """

    url: str

    @cached_property
    def root(self) -> Path:
        """This node's folder."""
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return (default_cache() / "stores" / name).absolute()

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        return open_filesystem(self.url)

    @property
    def filesystem(self) -> fs.FileSystem:
        """pyarrow's file system of the URL, opened at the first use."""
        return self._opened[0]

    def key(self, path: Path) -> str:
        """The path in the storage of a local path."""
        return str(PurePosixPath(self._opened[1]) / path.relative_to(self.root).as_posix())

    def stores(self, path: Path) -> bool:
        """Whether a local file belongs in the storage."""
        parts = path.relative_to(self.root).parts
        below = parts[1] if len(parts) > 1 else parts[0]
        return not below.startswith(LOCAL_ONLY)

    # -- one file ----------------------------------------------------------------------------------

    def upload(self, path: Path) -> None:
        """Store a local file, whole or not at all. Waits while the storage is unavailable, so that
        a search pauses and loses no measurement.
        """
        if self.stores(path):
            self._retry(lambda: self.write(self.key(path), path.read_bytes()))

    def download(self, path: Path) -> bool:
        """Replace a local file by the stored one; False if the storage has none."""
        content = self._retry(lambda: self.read(self.key(path)))
        if content is None:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_bytes(content)
        partial.replace(path)
        return True

    def write(self, key: str, content: bytes) -> None:
        """Replace an object."""
        try:
            write_file(self.filesystem, key, content)
        except OSError as error:
            raise storage_error(error, self.url, writing=True) from error

    def read(self, key: str) -> bytes | None:
        """An object's content; None if it does not exist."""
        system = self.filesystem
        try:
            with system.open_input_stream(key) as opened:
                content: bytes = opened.read()
                return content
        except FileNotFoundError:
            return None
        except OSError as error:
            if system.get_file_info(key).type == fs.FileType.NotFound:
                return None
            raise storage_error(error, self.url, writing=False) from error

    def remove(self, key: str) -> None:
        """Delete an object if it exists."""
        with contextlib.suppress(OSError):
            self.filesystem.delete_file(key)

    def _retry(self, call: Callable[[], T]) -> T:
        """The result of `call`, retried while the storage is unavailable. A request that is refused
        (no such bucket, no permission) raises at once.
        """
        start, waited = time.monotonic(), False
        while True:
            try:
                result = call()
            except UserError as error:
                if error.code != Code.UNAVAILABLE or time.monotonic() - start > RETRY_FOR_S:
                    raise
                if not waited:
                    log.warning("%s; paused until it answers", error)
                waited = True
                time.sleep(RETRY_INTERVAL_S)
            else:
                if waited:
                    log.warning("%s answers again: continuing", self.url)
                return result

    # -- a folder ----------------------------------------------------------------------------------

    def list_files(self, folder: Path, recursive: bool = False) -> dict[str, fs.FileInfo]:
        """The stored files of a folder, by their path relative to it."""
        try:
            return files_below(self.filesystem, self.key(folder), recursive=recursive)
        except OSError as error:
            raise storage_error(error, self.url, writing=False) from error

    def list_folders(self, folder: Path) -> tuple[str, ...]:
        """Names of the stored folders directly below a folder, sorted."""
        selector = fs.FileSelector(self.key(folder), allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return tuple(sorted(f.base_name for f in found if f.type == fs.FileType.Directory))

    def download_tree(self, folder: Path) -> None:
        """Fetch the stored files of a study that are missing locally or may have changed, except
        large ones, which are fetched when they are needed.
        """
        for name, stored in self.list_files(folder, recursive=True).items():
            path = folder / name
            if name.startswith(ON_DEMAND):
                continue
            same_size = path.is_file() and path.stat().st_size == stored.size
            if not (same_size and path.parent.name in IMMUTABLE):
                self.download(path)

    def upload_tree(self, folder: Path) -> None:
        """Store the files of a folder that are not stored yet, or in an older version."""
        stored = self.list_files(folder, recursive=True)
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or not self.stores(path) or path.name.startswith("."):
                continue
            info, local = stored.get(path.relative_to(folder).as_posix()), path.stat()
            if info is None or info.size != local.st_size or info.mtime_ns < local.st_mtime_ns:
                self.upload(path)

    def delete(self, path: Path) -> None:
        """Delete a file, or a folder and everything below it; a missing one is ignored."""
        self.remove(self.key(path))  # first: some file systems refuse to list a file
        for name in self.list_files(path, recursive=True):
            self.remove(self.key(path / name))

    def claim(self, folder: Path) -> AbstractContextManager[None]:
        """Hold a study exclusively, across machines (`search.files.claims`)."""
        return claims.claim(self, self.key(folder / "claim.json"), folder.name)
