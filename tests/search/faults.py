"""Breaking a real search, and looking afterwards at what lies on disk and in MLflow.

Used by `test_faults.py` and, many times over, by `tests/benchmarks/faults.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.run_contents import STUDY_ID_TAG, experiment_name
from vitpareto.search.tracking.server_address import tracking_uri

NAME = "k"


def driver(store: Path, cache: Path, log: Path, *options: Any) -> subprocess.Popen[bytes]:
    """`vitpareto search` as a user starts it: two workers, no more than it takes to be one."""
    arguments = [
        "search", "--name", NAME, "--images", 200, "--workers", 2, "--latency", "off",
        "--certify", "off", "--store", store, "--cache", cache, *options,
    ]  # fmt: skip
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "vitpareto", *map(str, arguments)],
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def results(store: Path) -> dict[str, bytes]:
    """The result files, byte for byte."""
    return {p.name: p.read_bytes() for p in (store / NAME / "trials").glob("[0-9]*.json")}


def until(true: Callable[[], Any], what: str, within: float = 900) -> Any:
    """What `true` gives, once it is true."""
    deadline = time.monotonic() + within
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.05)
    return found


def steady(store: Path, seconds: float = 8.0) -> dict[str, bytes]:
    """The results of a store, once none was added for so long."""
    seen, since = results(store), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.2)
        if (now := results(store)) != seen:
            seen, since = now, time.monotonic()
    return seen


def kill(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """kill -9; what it had started, which ends some time later (`gone`)."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGKILL)
    process.wait()
    return family


def gone(family: list[psutil.Process]) -> bool:
    return not any(map(_alive, family))


def _alive(process: psutil.Process) -> bool:
    """Not gone, and no zombie that nobody has asked for."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_process(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def workers() -> list[int]:
    """Processes of this machine in which trials run now."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(part.startswith("ray::TrialActor") for part in process.info["cmdline"] or ()):
            found.append(process.info["pid"])
    return found


@dataclass
class Broken:
    """What became of a study that was broken: all but `kills`, `trials` have to be empty or 0."""

    what: str
    kills: int
    trials: int
    lost: list[str]
    changed: list[str]
    twice: list[str]
    failed: list[str]
    unequal: list[str]

    @property
    def whole(self) -> bool:
        return not (self.lost or self.changed or self.twice or self.failed or self.unequal)


def look(store: Path, what: str, kills: int, seen: dict[str, bytes], mlflow: bool = True) -> Broken:
    """seen: result files as they were before."""
    folder = StudyFolder(store / NAME)
    now = results(store)
    every = folder.trials.all()
    measured = Counter(r.key for r in every if not r.reason.startswith("the same candidate"))
    return Broken(
        what,
        kills,
        len(every),
        lost=sorted(set(seen) - set(now)),
        changed=sorted(n for n in seen if n in now and now[n] != seen[n]),
        twice=[key for key, times in measured.items() if times > 1],
        failed=[f"{r.trial}: {r.reason}" for r in every if r.state == "failed"],
        unequal=unequal(folder) if mlflow else [],
    )


def unequal(folder: StudyFolder, uri: str | None = None) -> list[str]:
    """Where MLflow says something else than the study, in words."""
    client = open_client(tracking_uri(folder, uri))
    experiment = client.get_experiment_by_name(experiment_name(folder.name))
    if experiment is None:
        return ["there is no experiment"]
    runs = client.search_runs([experiment.experiment_id], f"tags.`{STUDY_ID_TAG}` LIKE '%'")
    said = [
        f"run of trial {r.data.tags.get('trial')} is {r.info.status}"
        for r in runs
        if r.info.status == "RUNNING"
    ]
    by_trial = Counter(r.data.tags.get("trial") for r in runs)
    said += [f"trial {t} has {n} runs" for t, n in by_trial.items() if n > 1]
    there = {r.data.tags["trial"]: r for r in runs if "trial" in r.data.tags}
    known = {str(r.trial): r for r in folder.trials.all()}
    said += [f"trial {t} is on one side only" for t in sorted(set(there) ^ set(known))]
    for trial in set(there) & set(known):
        metrics, values = there[trial].data.metrics, dict(known[trial].values)
        if known[trial].state == "raced_out":
            values["top1_estimate"] = values.pop("top1")
            values.pop("top5", None)
        said += [
            f"trial {trial}: {k} is {v}, in MLflow {metrics.get(k)}"
            for k, v in values.items()
            if abs(metrics.get(k, float("nan")) - v) > 1e-9 * abs(v) or k not in metrics
        ]
    return said
