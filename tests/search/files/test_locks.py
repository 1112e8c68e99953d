"""Locks between processes: exclusion, timeouts, and release when the holder is killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vitpareto.search.files.locks import LockTimeout, is_locked, locked

#: holds the lock as every version of this project does: flock on the file itself
HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""
TRY = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "a+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit("refused")
"""


@contextmanager
def holder(path: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_lock_excludes_processes_of_the_version_before(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", TRY, str(path)]
    with locked(path):
        assert is_locked(path)
        second = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert (second.returncode, second.stderr) == (1, "refused\n")
    assert path.is_file(), "a waiting process would lock a deleted file alone"
    assert not is_locked(path)
    assert subprocess.run(command, timeout=240).returncode == 0


def test_a_second_holder_times_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path):
        assert is_locked(path)
        start = time.monotonic()
        with pytest.raises(LockTimeout), locked(path, timeout_s=0.2):
            pass
        assert time.monotonic() - start >= 0.2
        assert is_locked(path), "the refused process must not release the holder's lock"


def test_a_killed_holder_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        with locked(path, timeout_s=0):
            pass


def test_waiting_is_logged_and_ends_with_the_holder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    with caplog.at_level(logging.INFO), holder(path) as process:
        waiting = threading.Event()

        class Seen(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                waiting.set()

        seen = Seen()
        logging.getLogger("vitpareto.search.files.locks").addHandler(seen)
        threading.Thread(target=lambda: waiting.wait(240) and process.kill()).start()
        with locked(path, waiting="waiting for the holder"):
            assert process.poll() is not None or process.wait(30) is not None
        logging.getLogger("vitpareto.search.files.locks").removeHandler(seen)
    assert [r.getMessage() for r in caplog.records if "locks" in r.name] == [
        "waiting for the holder"
    ]


def test_a_raising_block_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock"):
        raise ZeroDivisionError
    assert not is_locked(tmp_path / "lock")


def test_a_missing_file_is_not_locked_and_is_not_created(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


def test_a_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none" / "lock"):
        pass


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_lock_is_probed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch(mode=0o444)
    assert not is_locked(path)
    with pytest.raises(PermissionError), locked(path):
        pass
