"""What a search costs besides its trials: worker-busy share, driver time a trial, and their growth.

    python tests/benchmarks/overhead.py [--trials 100,1000,5000] [--workers 1,2,8,32]

Trials sleep; searcher, storage, durable results, MLflow and Ray are real. Two tables: two workers
and trials of 2 s; then growth over workers and trials with trials of 50 ms, all measured in full,
where the sampler's own time (ask and suggest, told apart) is not the driver's. Draws overhead.png.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
import timm
import torch
from matplotlib.figure import Figure

from vitpareto.search.study.job_request import JobRequest

from vitpareto.clusters.connect import local_cluster  # isort: skip  # before ray: it sets Ray's switches
from vitpareto import methods
from vitpareto.search.stats.racing import Race, rungs
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.objectives import OBJECTIVES
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.tracking.tracker import Tracker
from vitpareto.search.trials.early_stopping import EarlyStopping
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.searcher import FrontSearcher
from vitpareto.search.trials.tune import run_tune

from ray import tune  # isort: skip
from sleeping import ResultFolder, Sleep, SleepingTrial  # isort: skip  # it imports ray

OBJECTIVE_NAMES = ("top1", "gmacs")
SEARCHED = ("rajni", "topk", "tome", "evit", "ppt", "tram", "random", "resize")


@dataclass
class Clocked:
    """Seconds of this thread's CPU that calls took, by what was called: a machine that is busy with
    something else as well adds nothing to them.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    stamps: list[float] = field(default_factory=list)

    def clock(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **named: Any) -> Any:
            begin = time.thread_time()
            try:
                return call(*given, **named)
            finally:
                spent = time.thread_time() - begin
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return timed


@dataclass(frozen=True)
class Row:
    """One study: wall seconds from the first result to the last, driver CPU and sampler a trial."""

    workers: int
    trials: int
    seconds: float
    busy: float
    driver_ms: float
    sampler_ms: float
    #: driver time a trial in the last fifth over that in the first
    growth: float
    raced: int
    #: driver CPU, ms a trial, by what it was for
    parts: dict[str, float] = field(default_factory=dict)
    #: the driver's resident memory in MB, after a tenth of the trials and at the end
    memory_mb: tuple[float, float] = (0.0, 0.0)
    #: bytes a trial, by where they lie
    stored: dict[str, float] = field(default_factory=dict)


def study_of(workers: int, trials: int, sleep: float, sampler: str, race: bool) -> Row:
    """Run one study in a folder of its own, and what it took."""
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224").eval()
    images, clocked = 1000, Clocked()
    with tempfile.TemporaryDirectory() as scratch:
        folder = StudyFolder(Path(scratch) / "study")
        folder.create()
        folder.identity.settle({})
        folder.write_job(
            JobRequest({"objectives": list(OBJECTIVE_NAMES), "model": "m", "data": "d"})
        )
        folder.trials.start_epoch("epoch")
        early_stopping = None
        if race:
            race_rules = Race(images, 0.05, trials)
            early_stopping = EarlyStopping(
                race_rules, [OBJECTIVES[o] for o in OBJECTIVE_NAMES], Provenance()
            )
        cpu: list[float] = []
        memory: list[float] = []

        def count(result: Any, progress: Any) -> None:
            if result is not None:
                cpu.append(time.process_time() - clocked.seconds.get("sampler", 0.0))
                if len(cpu) == max(1, trials // 10):
                    memory.append(_memory_mb())
                clocked.stamps.append(time.perf_counter())

        with Tracker(folder, f"sqlite:///{scratch}/mlflow.db", notify=lambda _: None) as tracker:
            settings = SessionSettings(
                objectives=OBJECTIVE_NAMES, sampler=sampler, seed=0, trials=trials
            )
            session = StudySession(
                folder,
                Space.of(SEARCHED, {}, {}),
                settings,
                shape_of=ShapeFinder(model),
                hooks=[count, tracker.hear],
                early_stopping=early_stopping,
            )
            session.study.ask = clocked.clock("sampler", session.study.ask)
            session.proposals.space = _Clocked(session.proposals.space, clocked)  # type: ignore[assignment]
            searcher = FrontSearcher(session)
            for name in ("suggest", "on_trial_complete", "goes_on"):
                setattr(searcher, name, clocked.clock(name, getattr(searcher, name)))
            looked = rungs(images)[:-1] if race else ()
            task = Sleep(ResultFolder(folder.folder), "epoch", images, sleep, looked)
            resources = TrialResources(workers, 1, 0.0)
            before = time.process_time()
            run_tune(searcher, tune.with_parameters(SleepingTrial, task=task), resources)
            whole = time.process_time() - before
            progress = searcher.progress
        results = folder.trials.all()
        assert len(results) == trials == progress.done, (len(results), progress)
        # the first results come while workers still start
        skip = min(2 * workers, trials // 5)
        begin, end = clocked.stamps[skip], clocked.stamps[-1]
        asleep = sum(
            sleep * r.images / images
            for r in results
            if begin < r.ended_ms / 1e3 - _offset() <= end
        )
        each = [1e3 * (b - a) for a, b in zip(cpu[skip:], cpu[skip + 1 :], strict=False)]
        fifth = max(1, len(each) // 5)
        asked = clocked.seconds["sampler"]
        spent = {
            "sampler": asked,
            "proposing, but for the sampler": clocked.seconds["suggest"] - asked,
            "telling": clocked.seconds["on_trial_complete"],
        }
        spent["Ray Tune, MLflow's thread and all else"] = whole - sum(spent.values())
        return Row(
            workers,
            trials,
            end - begin,
            asleep / (workers * (end - begin)),
            statistics.mean(each),
            1e3 * clocked.seconds["sampler"] / trials,
            statistics.mean(each[-fifth:]) / statistics.mean(each[:fifth]),
            progress.raced_out,
            {name: 1e3 * seconds / trials for name, seconds in spent.items()},
            (memory[0], _memory_mb()),
            {
                "results": _size(folder.folder / "trials") / trials,
                "Optuna's journal": _size(folder.journal) / trials,
                "outbox": _size(folder.folder / "outbox.jsonl") / trials,
                "MLflow's database": _size(Path(scratch) / "mlflow.db") / trials,
            },
        )


def _memory_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def _size(path: Path) -> int:
    """Bytes of a file, or of a folder's files."""
    if path.is_dir():
        return sum(f.stat().st_size for f in path.iterdir())
    return path.stat().st_size if path.exists() else 0


def _offset() -> float:
    """What turns time.time() into time.perf_counter()."""
    return time.time() - time.perf_counter()


class _Clocked:
    """A space whose asking is the sampler's time."""

    def __init__(self, space: Space, clocked: Clocked) -> None:
        self._space = space
        self.suggest = clocked.clock("sampler", space.suggest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)


HEAD = ("workers", "trials", "s", "busy %", "driver ms", "sampler ms", "last/first fifth", "raced")


def show(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for r in rows:
        print(
            f"| {r.workers} | {r.trials} | {r.seconds:.1f} | {100 * r.busy:.1f} | "
            f"{r.driver_ms:.1f} | {r.sampler_ms:.1f} | {r.growth:.2f} | {r.raced} |"
        )


def draw(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for workers in sorted({r.workers for r in rows}):
        own = sorted((r for r in rows if r.workers == workers), key=lambda r: r.trials)
        axes.plot(
            [r.trials for r in own], [r.driver_ms for r in own], marker="o",
            label=f"{workers} worker{'s' if workers > 1 else ''}",
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="trials of the study", ylabel="driver CPU, ms a trial", ylim=(0, None)
    )
    axes.axhline(50, color="0.6", linestyle="--", linewidth=1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", default="100,1000,5000")
    parser.add_argument("--workers", default="1,2,8,32")
    parser.add_argument("--out", type=Path, default=Path("overhead.png"))
    given = parser.parse_args()
    trials = [int(t) for t in given.trials.split(",")]
    workers = [int(w) for w in given.workers.split(",")]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("vitpareto").setLevel(logging.ERROR)
    # workers are given this folder, where `sleeping` lies
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    print(
        f"methods: {', '.join(m for m in SEARCHED if m in methods.names())}; 1,000 images a trial"
    )
    with local_cluster(2):
        rows = [
            study_of(2, 60, 2.0, "tpe", race=False),
            study_of(2, 60, 2.0, "tpe", race=True),
        ]
    show("2 workers, trials of 2 s; in full, then raced", rows)
    grown = []
    for resources in workers:
        with local_cluster(resources):
            for many in trials:
                grown.append(study_of(resources, many, 0.05, "random", race=False))
                show("growth, trials of 50 ms, random sampler", grown[-1:])
    show("growth, trials of 50 ms, random sampler", grown)
    draw(grown, given.out)


if __name__ == "__main__":
    main()
