"""Run from folders whose modules have the names of ours, or are another checkout of ours.

Ray puts the driver's working directory first on every worker's path. Whatever lies there, every
process of a search runs the code of the driver, and figures are those of a run from an empty
folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import yaml

from tests.clusters.running import running
from vitpareto.methods import Recipe
from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import measure_recipe
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

ROOT = Path(__file__).parents[1]
FOLDERS = ("vitpareto", "methods", "search", "clusters", "dashboards")
COMMAND = Path(sys.executable).with_name("vitpareto")
#: recipe and top-1 of a trial
Found = tuple[dict[str, Any], float]
JOB = {"trials": 4, "methods": ["topk"], "images": 100, "race": "off", "latency": "off",
       "tracking_uri": "none"}  # fmt: skip

#: appended to the other checkout: every image counts as right
WRONG = """

_evaluate = evaluate


def evaluate(*arguments, **options):
    import dataclasses

    found = _evaluate(*arguments, **options)
    return dataclasses.replace(found, top1=found.top1 | True, top5=found.top5 | True)
"""


@dataclass(frozen=True)
class WorkingDirectory:
    """A folder in which commands are run."""

    folder: Path
    cache: Path

    def run(self, *arguments: object, code: int = 0, **variables: str) -> str:
        """The installed command, run from here; what it wrote to standard output."""
        done = subprocess.run(
            [COMMAND, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True,
            timeout=800, check=False, env={**os.environ, **variables},
        )  # fmt: skip
        assert done.returncode == code, done.stderr[-4000:]
        return done.stdout if code == 0 else done.stderr

    def search(self) -> list[Found]:
        """The trials of a search from here; its front is certified too."""
        job = self.folder / "job.yaml"
        job.write_text(yaml.safe_dump(JOB))
        self.run("search", job, "--name", "s", "--store", "studies", "--cache", self.cache)
        return self.trials("studies")

    def trials(self, store: object) -> list[Found]:
        """The trials of the study `s` of a store."""
        lines = self.run("trials", "s", "--json", "--store", store).splitlines()
        rows = map(json.loads, lines)
        return [(row["recipe"], row["top1"]) for row in rows]


Assert = Callable[[list[Found]], None]


@pytest.fixture
def assert_right(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Assert:
    """Asserts that trials have the accuracies that this process measures for their recipes."""

    def check(found: list[Found]) -> None:
        folders = {"store": str(tmp_path_factory.mktemp("here")), "cache": str(cache)}
        worker = Worker.open(study_task(check_job(SearchConfig.of({**JOB, **folders})), threads=1))
        expected = [
            measure_recipe(worker, number, Recipe.from_dict(recipe)).values["top1"]
            for number, (recipe, _) in enumerate(found)
        ]
        assert len(found) == JOB["trials"] and max(expected) < 100
        assert [top1 for _, top1 in found] == expected

    return check


@pytest.fixture
def foreign(tmp_path: Path, cache: Path) -> WorkingDirectory:
    """A research repository: packages and modules of generic names, of which none may be imported,
    and another checkout in a folder below.
    """
    for name in ("methods", "search", "clusters", "dashboards", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('foreign {name}')\n")
    (tmp_path / "statistics.py").write_text("raise RuntimeError('foreign statistics')\n")
    checkout(tmp_path / "vitpareto-old")
    return WorkingDirectory(tmp_path, cache)


def checkout(folder: Path) -> Path:
    """Another checkout of this project, whose evaluation counts every image as right."""
    ignored = shutil.ignore_patterns("__pycache__", "*.png")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copyfile(ROOT / "setup.py", folder / "setup.py")
    (defined,) = (p for p in folder.rglob("*.py") if "\ndef evaluate(" in p.read_text())
    defined.write_text(defined.read_text() + WRONG)
    return folder


def test_a_search_from_a_folder_of_foreign_modules(
    foreign: WorkingDirectory, assert_right: Assert
) -> None:
    assert_right(foreign.search())


@pytest.mark.slow
def test_a_search_from_another_checkout(tmp_path: Path, cache: Path, assert_right: Assert) -> None:
    other = WorkingDirectory(checkout(tmp_path / "other"), cache)
    assert_right(other.search())


@pytest.mark.slow
def test_the_other_checkout_would_be_noticed(tmp_path: Path, cache: Path) -> None:
    """The tests above can fail: run as itself, the other checkout counts all images as right."""
    other = checkout(tmp_path / "other")
    found = WorkingDirectory(other, cache)
    done = subprocess.run(
        [sys.executable, "-m", "vitpareto", "search", "--name", "s", "--store", "studies",
         "--cache", cache, "--trials", "2", "--methods", "topk", "--latency", "off",
         "--certify", "off", "--tracking-uri", "none"],
        cwd=other, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert {top1 for _, top1 in found.trials("studies")} == {100.0}


@pytest.mark.slow
def test_workers_with_other_code_are_refused(tmp_path: Path, cache: Path) -> None:
    """A Ray that the caller started in another checkout: its workers import that one."""
    other = checkout(tmp_path / "other")
    code = f"""
        import os, sys
        import ray
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
                 _node_ip_address="127.0.0.1")
        from vitpareto.clusters.connect import local_cluster
        from vitpareto.methods import BadInput
        from vitpareto.search.study.job import SearchConfig
        from vitpareto.search.trials.job_check import check_job
        from vitpareto.search.trials.run_study import run_study
        config = SearchConfig.of({{"name": "s", "store": {str(tmp_path / "studies")!r},
                                  "cache": {str(cache)!r}, "methods": "topk", "trials": 2}})
        job = check_job(config)
        with local_cluster() as capacity:
            try:
                run_study(job, cpus=capacity.cpus, gpus=0)
            except BadInput as error:
                print(error.code, error.details["nodes"])
        """
    done = subprocess.run(
        # -P: this process itself imports the installed code
        [sys.executable, "-P", "-c", textwrap.dedent(code)], cwd=other,
        capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"{Code.MISMATCH} ['127.0.0.1']"


CELL = """
import vitpareto, timm
from vitpareto.clusters.connect import local_cluster
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.run_study import run_study

model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
vitpareto.prune(model, "tome", r=13)
job = check_job(SearchConfig.of(JOB))
with local_cluster() as capacity:
    outcome = run_study(job, cpus=capacity.cpus, gpus=capacity.gpus)
results = sorted(outcome.folder.trials.all(), key=lambda r: r.trial)
import json
print(json.dumps([[r.recipe.to_json(), r.values["top1"]] for r in results]))
"""


@pytest.mark.slow
def test_a_notebook_cell_among_foreign_modules(
    foreign: WorkingDirectory, assert_right: Assert
) -> None:
    # a kernel has its folder first on its own path: a foreign module must at least import
    (foreign.folder / "statistics.py").write_text("def mean(values):\n    return 0\n")
    job = {**JOB, "name": "n", "store": "studies", "cache": str(foreign.cache)}
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CELL.replace("JOB", repr(job)))]
    )
    done = nbclient.NotebookClient(
        book, timeout=800, kernel_name="python3", resources={"metadata": {"path": foreign.folder}}
    ).execute()
    text = "".join(o.get("text", "") for o in done.cells[0].outputs if o.get("name") == "stdout")
    assert_right([tuple(found) for found in json.loads(text.splitlines()[-1])])


@pytest.mark.slow
def test_submit_and_cluster_local_among_foreign_modules(
    foreign: WorkingDirectory, assert_right: Assert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "cluster"
    log.mkdir()
    store = tmp_path / "shared"
    (foreign.folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    monkeypatch.chdir(foreign.folder)
    with running(log, 2) as cluster:
        foreign.run(
            "submit", "job.yaml", "--address", cluster.dashboard, "--store", store,
            "--name", "s", "--follow", **cluster.environment,
        )  # fmt: skip
    assert_right(foreign.trials(store))


@pytest.mark.slow
def test_ui_among_foreign_modules(foreign: WorkingDirectory) -> None:
    """The store is the folder of the foreign modules: neither MLflow nor uvicorn imports them."""
    for name in ("mlflow", "uvicorn"):
        (foreign.folder / f"{name}.py").write_text(f"raise RuntimeError('foreign {name}')\n")
    command = [COMMAND, "ui", "--store", "."]
    with subprocess.Popen(command, cwd=foreign.folder, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            address = served.stdout.readline().strip()
            with urllib.request.urlopen(address, timeout=30) as answer:
                assert b"<title>MLflow" in answer.read()
        finally:
            served.terminate()
            assert served.wait(60) == 143
