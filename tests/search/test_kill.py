"""kill -9 on the driver of a real search, then the same command: nothing lost, nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRIALS = 14


def driver(store: Path, cache: Path, log: Path) -> subprocess.Popen[bytes]:
    arguments = ["search", "--name", "k", "--trials", TRIALS, "--images", 200, "--workers", 2,
                 "--latency", "off", "--store", store, "--cache", cache]  # fmt: skip
    with open(log, "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "vitpareto", *map(str, arguments)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def results(store: Path) -> dict[str, dict]:
    return {p.name: json.loads(p.read_text()) for p in (store / "k" / "trials").glob("[0-9]*.json")}


def children(pid: int) -> list[int]:
    """All live descendants of a process, by /proc."""
    table: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        table.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo += (mine := table.get(todo.pop(), []))
        found += mine
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.timeout(420)
def test_kill_9_then_the_same_command(tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    first = driver(tmp_path, cache, log)
    deadline = time.monotonic() + 180
    while len(results(tmp_path)) < 4:
        assert first.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "four trials took too long"
        time.sleep(0.05)
    family = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = results(tmp_path)

    second = driver(tmp_path, cache, log)
    code = second.wait(timeout=240)
    said = log.read_text()
    assert code == 0, said
    after = results(tmp_path)

    # what was finished is the same file, byte for byte
    late = {n: r for n, r in after.items() if n in before}
    assert late == before
    assert len(after) == TRIALS and all(r["state"] == "finished" for r in after.values())
    measured = [r["key"] for r in after.values() if not r["reason"]]
    assert len(measured) == len(set(measured)), "a candidate was measured twice"
    assert f"{TRIALS} trials measured" in said

    # the dead driver's Ray went with it
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not [pid for pid in family if alive(pid)]
