"""Folders that are also kept in an object store, and fetching their files on demand.

A folder is registered once per process (`register_object_store`). From then on
`search.files.atomic` writes its files to the object store too, and the functions here fetch what is
missing locally. For a folder that is not registered they look at the local disk alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class FolderStore(Protocol):
    """What `search.files.object_store.ObjectStore` does for a registered folder."""

    def upload(self, path: Path) -> None:
        """Store the file as it is now."""

    def download(self, path: Path) -> bool:
        """Replace the local file; False if the object store has none."""

    def list_files(self, folder: Path) -> Iterable[str]:
        """Names of the files directly in a folder."""

    def delete(self, path: Path) -> None:
        """Delete a file, or a folder and everything below it."""

    def claim(self, folder: Path) -> AbstractContextManager[None]:
        """Hold the folder exclusively, across machines."""


_stores: dict[Path, FolderStore] = {}


def register_object_store(root: Path, store: FolderStore) -> None:
    """Keep everything that is written below `root` in `store` too, from now on."""
    _stores[root] = store


def object_store_of(path: Path) -> FolderStore | None:
    """The object store that keeps `path`; None if the file is local only."""
    if _stores:
        for root in (path, *path.parents):
            if root in _stores:
                return _stores[root]
    return None


def fetch_if_missing(path: Path) -> bool:
    """Whether a file exists that never changes once written; it is fetched if it is not local."""
    if path.is_file():
        return True
    store = object_store_of(path)
    return store is not None and store.download(path)


def refresh(path: Path) -> bool:
    """Whether a file exists that other processes may have changed; the current one is fetched."""
    store = object_store_of(path)
    return path.is_file() if store is None else store.download(path) or path.is_file()


def list_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a glob pattern, sorted by name; missing ones are fetched."""
    store = object_store_of(folder)
    if store is not None:
        for name in store.list_files(folder):
            if fnmatch.fnmatch(name, pattern) and "/" not in name:
                fetch_if_missing(folder / name)
    return sorted(folder.glob(pattern))
