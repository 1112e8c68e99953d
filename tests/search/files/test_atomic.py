"""Atomic writes: the old file or the new one, nothing beside it, and a pause on a full disk."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.logs import logged
from vitpareto.search.files import atomic
from vitpareto.search.files.atomic import (
    delete_file,
    delete_tree,
    disable_writes,
    replacing,
    retry_while_disk_full,
    write_atomic,
)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    write_atomic(path, "new: ä")
    assert path.read_text(encoding="utf-8") == "new: ä"
    write_atomic(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert files(tmp_path) == ["a.json"]


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "a.json", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    text = "new"
    if fails == "write":
        text = "half a surrogate: \udc00"  # cannot be encoded: the write itself raises
    else:

        def broken(*_: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, fails, broken)
    with pytest.raises((OSError, UnicodeEncodeError)):
        write_atomic(path, text)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["a.json"]


def test_a_raising_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert files(tmp_path) == ["a.json"]


@pytest.mark.parametrize("full", atomic.DISK_FULL)
def test_a_full_disk_is_waited_for_and_logged_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    full: int,
) -> None:
    monkeypatch.setattr(atomic, "RETRY_INTERVAL_S", 0.0)
    attempts: list[int] = []

    def write() -> str:
        attempts.append(1)
        if len(attempts) < 4:
            raise OSError(full, os.strerror(full))
        return "written"

    with caplog.at_level(logging.WARNING):
        assert retry_while_disk_full(tmp_path / "a", write) == "written"
    assert len(attempts) == 4
    paused, continued = logged(caplog, "atomic")
    assert paused.args == (os.strerror(full), tmp_path / "a") and continued.args == (
        tmp_path / "a",
    )


def test_other_errors_are_raised(tmp_path: Path) -> None:
    def write() -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with pytest.raises(PermissionError):
        retry_while_disk_full(tmp_path / "a", write)


def test_deleting_ignores_what_does_not_exist(tmp_path: Path) -> None:
    delete_file(tmp_path / "none")
    delete_tree(tmp_path / "none")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    delete_file(tmp_path / "a" / "b" / "file")
    assert files(tmp_path / "a" / "b") == []
    delete_tree(tmp_path / "a")
    assert files(tmp_path) == []


def test_disabled_writes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_writes", True)  # restored after the test
    path = tmp_path / "a.json"
    write_atomic(path, "kept")
    disable_writes()
    write_atomic(path, "lost")
    delete_file(path)
    delete_tree(tmp_path)
    assert path.read_text() == "kept"
    assert files(tmp_path) == ["a.json"]
