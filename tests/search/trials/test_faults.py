"""What happens to driver, worker, node, disk, memory and database, and what is left afterwards."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import ray
import torch
from optuna.trial import TrialState
from ray.cluster_utils import Cluster

from tests import refusals
from tests.logs import logged
from tests.search.faults import NAME, driver, gone, kill, look, results, steady, until, workers
from vitpareto.methods import Code, Recipe
from vitpareto.search.errors import UserError
from vitpareto.search.measure.accuracy import OutOfMemory, largest_fitting_batch
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.optuna_storage import close, frozen_trials, open_storage, study_name
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.session import SessionSettings, StudySession
from vitpareto.search.study.shapes import ShapeFinder
from vitpareto.search.study.space import Space
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.trial_actor import TrialActor
from vitpareto.search.trials.worker import Worker

TRIALS = 14


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_continues_after_its_driver_is_killed(tmp_path: Path, cache: Path) -> None:
    """Of two drivers one is refused; the other is killed, and a third takes over."""
    logs = [tmp_path / "log0", tmp_path / "log1"]
    both = [driver(tmp_path, cache, log, "--trials", TRIALS) for log in logs]
    try:
        until(lambda: any(d.poll() is not None for d in both), "one of two drivers ends")
        refused = next(i for i, d in enumerate(both) if d.poll() is not None)
        assert both[refused].returncode == 2
        first, log = both[1 - refused], logs[1 - refused]
        until(lambda: len(results(tmp_path)) >= 4 or first.poll() is not None, "four trials")
        assert first.poll() is None, log.read_text()
        lock = StudyFolder(tmp_path / NAME).lock
        with refusals.refused(Code.BUSY, UserError, study=NAME), lock.hold():
            pass
    finally:
        family = [p for one in both for p in kill(one)]
    seen = results(tmp_path)
    second = driver(tmp_path, cache, log, "--trials", TRIALS)
    assert second.wait(timeout=900) == 0, log.read_text()
    found = look(tmp_path, "driver", 1, seen)
    assert found.whole, found
    assert found.trials == TRIALS, log.read_text()
    until(lambda: gone(family), "the dead driver's Ray goes with it")


# ------------------------------------------------------------------------------------- the cluster


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Cluster, Any]]:
    """A Ray of a head with one CPU and a node with another, on this machine."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False},
    )
    try:
        node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster, node
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_study_survives_a_killed_worker_and_a_killed_node(tmp_path: Path, cache: Path) -> None:
    config = SearchConfig.of({
        "name": NAME, "trials": 24, "store": str(tmp_path), "workers": 2, "images": 200,
        "cache": str(cache), "device": "cpu", "latency": "off", "certify": "off", "race": "off",
    })  # fmt: skip
    prepared = check_job(config)
    seen: dict[str, bytes] = {}
    killed: list[str] = []

    with two_nodes() as (cluster, node):

        def breaking() -> None:
            running = until(lambda: len(results(tmp_path)) >= 2 and workers(), "two trials")
            os.kill(running[0], signal.SIGKILL)
            killed.append("worker")
            until(lambda: len(results(tmp_path)) >= 5, "five trials")
            seen.update(results(tmp_path))
            cluster.remove_node(node, allow_graceful=False)
            killed.append("node")

        thread = threading.Thread(target=breaking)
        thread.start()
        outcome = run_study(prepared, cpus=2, gpus=0)
        folder, tally = outcome.folder, outcome.progress
        thread.join(timeout=600)
    assert killed == ["worker", "node"]
    found = look(tmp_path, "worker and node", 2, seen, mlflow=False)
    assert found.whole and found.trials == 24, found
    assert tally.ended == "24 trials measured"
    failed = [t for t in frozen_trials(folder) if t.state == TrialState.FAIL]
    whys = {t.user_attrs.get("reason") for t in failed}
    assert whys == {"the worker died"}, "what was in flight was failed and run again"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_worker_and_one_seed_are_reproducible(
    tmp_path: Path, cache: Path, capacity: Any
) -> None:
    found = []
    for store in ("one", "two"):
        config = SearchConfig.of({
            "name": NAME, "trials": TRIALS, "images": 120, "store": str(tmp_path / store),
            "cache": str(cache), "device": "cpu", "latency": "off", "certify": "off",
            "workers": 1, "seed": 5, "methods": "tome,topk,random",
        })  # fmt: skip
        folder = run_study(check_job(config), cpus=1, gpus=0).folder
        found.append([
            (r.trial, r.state, r.recipe, r.resolved, r.images, r.values.get("gmacs"), r.bits)
            for r in folder.trials.all()
        ])  # fmt: skip
    assert found[0] == found[1] and len(found[0]) == TRIALS


# -------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("broken", "recipe", "reason"),
    [
        (True, Recipe.of("topk", keep_rate=0.5), "NonFiniteLogits: non-finite logits, first for"),
        (False, Recipe.of("topk", keep_rate=0.5, prune_layers=[40]), "BadInput: .*40"),
    ],
)
def test_a_failing_recipe_is_a_failed_trial_and_the_worker_continues(
    worker: Worker, broken: bool, recipe: Recipe, reason: str
) -> None:
    actor = TrialActor.__new__(TrialActor)
    actor.worker = Worker(worker.task, copy.deepcopy(worker.dense), worker.shape)
    if broken:
        with torch.no_grad():
            next(actor.worker.dense.parameters()).fill_(float("nan"))
    actor.reset_config({"trial": 3, "key": "k", "recipe": recipe.to_dict()})
    assert actor.step()["done"] is True
    failed = worker.task.study.folder.trials.get(3)
    assert failed is not None and failed.state == "failed" and not failed.values
    assert re.match(reason, failed.reason), failed.reason
    assert "Traceback" in failed.provenance.traceback
    actor.worker = worker
    actor.reset_config({"trial": 4, "key": "k4", "recipe": Recipe.of("tome", r=2).to_dict()})
    while not actor.step()["done"]:
        pass
    after = worker.task.study.folder.trials.get(4)
    assert after is not None and after.state == "finished"


# ---------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system cannot be mounted here (needs root)")
    yield place
    # lazily: a process of Ray's may be about to end there
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_full_disk_pauses_the_study(small_disk: Path, cache: Path) -> None:
    log = small_disk.parent / "log"
    begun = driver(small_disk, cache, log, "--trials", TRIALS, "--race", "off")
    try:
        until(lambda: len(results(small_disk)) >= 4 or begun.poll() is not None, "four trials")
        ballast = small_disk / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as full:
            while True:
                full.write(bytes(4096))
        until(lambda: b"the disk of" in log.read_bytes(), "the driver reports the full disk")
        seen = steady(small_disk)
        assert begun.poll() is None, log.read_text()
        assert len(seen) < TRIALS
        ballast.unlink()
        assert begun.wait(timeout=900) == 0, log.read_text()
    finally:
        if begun.poll() is None:
            kill(begun)
    found = look(small_disk, "full disk", 0, seen)
    assert found.whole and found.trials == TRIALS, (found, log.read_text())


# -------------------------------------------------------------------------------------- the memory


def test_the_batch_is_halved_when_memory_does_not_suffice() -> None:
    asked = []

    def attempt(batch: int) -> str:
        asked.append(batch)
        if batch > 16:
            torch.empty(2**60, dtype=torch.uint8)  # torch's own error, on any machine
        return "fits"

    assert largest_fitting_batch(100, attempt) == (12, "fits") and asked == [100, 50, 25, 12]
    with pytest.raises(OutOfMemory):
        largest_fitting_batch(4, lambda batch: torch.empty(2**60, dtype=torch.uint8))
    other = RuntimeError("something else")

    def fails(batch: int) -> str:
        raise other

    with pytest.raises(RuntimeError) as caught:
        largest_fitting_batch(4, fails)
    assert caught.value is other


LIMITED = """
import resource, sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from vitpareto.methods import Recipe
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.trial_actor import TrialActor
from vitpareto.search.trials.worker import Worker
from vitpareto.search.trials.measurement import measure_recipe

config = SearchConfig.of({"images": 400, "batch": 400, "store": sys.argv[1], "cache": sys.argv[2],
                          "device": "cpu"})
worker = Worker.open(study_task(check_job(config), threads=1))
fixed = Recipe.of("topk", keep_rate=0.5)
adaptive = Recipe.of("rajni", gamma=0.1, min_tokens=8, budget="image")
# what is kept for good is taken now: threads, kernels
execution = replace(worker.task.execution, batch=8)
small = Worker(replace(worker.task, execution=execution), worker.dense, worker.shape)
for recipe in (fixed, adaptive):
    measure_recipe(small, 0, recipe)
here = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for limit in (here + 60 * 2**20, resource.RLIM_INFINITY):
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for recipe in (fixed, adaptive):
        result = measure_recipe(worker, 1, recipe)
        print(result.provenance.batch, result.values["top1"], result.values["gmacs"])
"""


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_uses_smaller_batches(tmp_path: Path, cache: Path) -> None:
    """In a process that may take 60 MB more than it has, and gives back what it has freed."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path, cache],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = ([float(x) for x in line.split()] for line in done.stdout.splitlines())
    scarce, less, ample, padded = lines
    assert ample[0] == padded[0] == 400
    assert 1 <= scarce[0] < 400 and 1 <= less[0] < 400
    assert scarce[1:] == ample[1:], "neither accuracy nor a fixed cost depend on the batch"
    # every image of a batch pays for its longest
    assert less[2] <= padded[2]


# ------------------------------------------------------------------------------------- a database


def _found(program: str) -> str | None:
    places = [str(p) for p in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(program) or shutil.which(program, path=os.pathsep.join(places))


class Postgres:
    """A real server on loopback, with its data in a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vitpareto-postgres-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # it refuses to run as root
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "postgres")
        self._do(
            "initdb", "-D", str(self.folder / "data"), "-U", "search", "-A", "trust", "--no-sync"
        )

    def _do(self, program: str, *arguments: str) -> None:
        found = _found(program)
        assert found is not None
        done = subprocess.run(
            [*self.user, found, *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
            cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        settings = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        data, log = str(self.folder / "data"), str(self.folder / "log")
        self._do("pg_ctl", "-D", data, "-l", log, "-o", settings, "-w", "start")

    def stop(self) -> None:
        self._do("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://search@127.0.0.1:{self.port}/postgres"


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if _found("initdb") is None or _found("pg_ctl") is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    server = Postgres()
    server.start()
    yield server
    with contextlib.suppress(AssertionError):  # where the test stopped it
        server.stop()
    shutil.rmtree(server.folder)


@contextlib.contextmanager
def proposing(folder: StudyFolder, worker: Worker, url: str | None) -> Iterator[StudySession]:
    """What the driver of a study holds."""
    storage = open_storage(folder, url)
    settings = SessionSettings(objectives=("top1", "gmacs"), sampler="tpe", seed=0, trials=10)
    space, shape_of = Space.of(("tome", "topk"), {}, {}), ShapeFinder(worker.dense)
    yield StudySession(folder, space, settings, shape_of=shape_of, storage=storage)
    close(storage)


def measure(own: StudySession, worker: Worker, count: int) -> list[TrialResult]:
    made = []
    for _ in range(count):
        proposal = own.next("t")
        assert proposal is not None
        made.append(measure_recipe(worker, proposal.number, proposal.recipe))
        own.folder.trials.write(made[-1])
        own.complete("t")
    return made


@pytest.fixture
def worker(tmp_path: Path, cache: Path) -> Worker:
    config = SearchConfig.of({
        "images": 40, "store": str(tmp_path / "studies"), "cache": str(cache), "device": "cpu",
    })  # fmt: skip
    return Worker.open(study_task(check_job(config), threads=1))


@pytest.mark.slow
def test_trials_are_stored_in_postgresql(
    postgres: Postgres, tmp_path: Path, worker: Worker
) -> None:
    folder = StudyFolder(tmp_path / "s")
    folder.create()
    with proposing(folder, worker, postgres.url) as own:
        measure(own, worker, 4)
    assert not folder.journal.exists()

    # a driver that dies in the middle of a trial, and the server with it
    with proposing(folder, worker, postgres.url) as dying:
        assert dying.next("lost") is not None
        postgres.stop()
        assert dying.next("away") is None, "a database that is away is waited for"
        postgres.start()
    with proposing(folder, worker, postgres.url) as own:
        assert own.progress.done == 4
        measure(own, worker, 6)
    assert [r.state for r in folder.trials.all()] == ["finished"] * 10
    assert study_name(folder).startswith("s-")
    told = frozen_trials(folder)
    assert not [t for t in told if t.state == TrialState.RUNNING]
    for result in folder.trials.all():
        assert told[result.trial].values == [result.values["top1"], result.values["gmacs"]]

    with pytest.raises(UserError):
        open_storage(folder)


def test_a_lost_optuna_storage_reuses_no_trial_number(tmp_path: Path, worker: Worker) -> None:
    folder = StudyFolder(tmp_path / "s")
    folder.create()
    with proposing(folder, worker, None) as own:
        measure(own, worker, 5)
    before = folder.trials.all()
    folder.journal.unlink()
    with proposing(folder, worker, None) as own:
        assert own.progress.done == 5
        more = measure(own, worker, 5)
    assert min(r.trial for r in more) > max(r.trial for r in before)
    assert folder.trials.all()[:5] == before
    assert not {r.key for r in more} & {r.key for r in before}


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "postgresql+psycopg://me:secret@host/db",
        "oracle://me@host/db",
        "postgresql+psycopg://me@127.0.0.1:1/db",
    ],
)
def test_an_unusable_database_is_refused(tmp_path: Path, url: str) -> None:
    folder = StudyFolder(tmp_path / "s")
    folder.create()
    with pytest.raises(UserError) as caught:
        open_storage(folder, url)
    assert "secret" not in str(caught.value)
    assert folder.identity.is_empty, "nothing was begun"


def test_the_optuna_journal_survives_a_full_disk(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StudyFolder(small_disk / "s")
    folder.create()
    study = optuna.create_study(storage=open_storage(folder), study_name="s")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as full:
        while True:
            full.write(bytes(512))
    paused = threading.Event()

    def make_room() -> None:
        until(lambda: logged(caplog, "atomic"), "a write waits for space")
        paused.set()
        ballast.unlink()

    room = threading.Thread(target=make_room)
    room.start()
    for value in range(40):  # more than what is left of the last page
        study.add_trial(optuna.trial.create_trial(value=value, user_attrs={"long": "x" * 500}))
    assert paused.is_set(), "there was room all along"
    room.join()
    assert len(frozen_trials(folder)) == 41
