"""A study whose results become durable one at a time, and what MLflow should hold of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import Front, reference_point
from vitpareto.search.study.front_table import study_front_rows
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.progress import StudyProgress
from vitpareto.search.study.provenance import Provenance
from vitpareto.search.study.recorded_recipe import RecordedRecipe, RecordedStep
from vitpareto.search.study.results import TrialResult
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.page import StudyPage
from vitpareto.search.tracking.run_contents import STUDY_ID_TAG, experiment_name, ranks_of
from vitpareto.search.tracking.server_address import tracking_uri
from vitpareto.search.tracking.tracker import Tracker

OBJECTIVES = ("top1", "gmacs")
AXES = objectives_named(OBJECTIVES)
Hook = Callable[[TrialResult | None, StudyProgress], None]


class GrowingStudy:
    """A study on disk, and the progress that a searcher would report with each result."""

    def __init__(self, store: Path, name: str) -> None:
        self.folder = StudyFolder(store / name)
        self.folder.create()
        common = {"model": "digits", "objectives": list(OBJECTIVES), "seed": 0}
        self.folder.write_job(JobRequest({"name": name, "data": "digits", "trials": 100, **common}))
        self.folder.identity.settle({**common, "methods": ["tome", "topk"], "min_gmacs": None})
        self.progress = StudyProgress(requested=100)
        self.front: Front | None = None
        self.random = random.Random(0)

    def next_result(self) -> TrialResult:
        """Trial 0 is the dense model; of five trials one fails, one is stopped early."""
        trial = self.progress.done
        image_bits = {"images": 8, "bits": "/w=="}
        values = {"top1": 80.0, "top5": 95.0, "gmacs": 4.0, "params_m": 1.5, "peak_mb": 9.0}
        if trial == 0:
            versions = Provenance(versions={"torch": "2.13", "timm": "1.0"})
            return TrialResult(
                0,
                "finished",
                RecordedRecipe(),
                "k0",
                values,
                seconds=0.5,
                provenance=versions,
                **image_bits,
            )
        below = RecordedStep("resize", {"size": 32}) if trial % 2 else None
        tokens = RecordedStep("topk", {"keep_rate": 0.5, "prune_layers": [3, 6, 9]})
        recipe = RecordedRecipe(below, tokens)
        if trial % 5 == 3:
            return TrialResult(trial, "failed", recipe, f"k{trial}", reason="it raised: no memory")
        gmacs = self.random.uniform(1, 4)
        values |= {"top1": 60 + 6 * gmacs - self.random.uniform(0, 9), "gmacs": gmacs}
        state: Any = "raced_out" if trial % 5 == 4 else "finished"
        return TrialResult(trial, state, recipe, f"k{trial}", values, seconds=0.5, **image_bits)

    def add_result(self, hook: Hook | None = None) -> None:
        """Write one more result, then call the hook."""
        result, progress = self.next_result(), self.progress
        self.folder.trials.write(result)
        if result.state == "failed":
            progress.failed += 1
        elif result.state == "raced_out":
            progress.raced_out += 1
        else:
            progress.finished += 1
            if self.front is None:
                dense = {o.name: result.values[o.name] for o in AXES}
                self.front = Front(AXES, reference_point(dense, AXES))
            self.front.add(result.trial, result.values)
            progress.hypervolume = self.front.hypervolume()
            progress.front = tuple(m.trial for m in self.front.members())
        if hook is not None:
            hook(result, progress)

    def page(self) -> StudyPage:
        """Two pictures and the front's table."""
        files = {}
        for name in ("front.png", "front.svg"):
            files[name] = self.folder.folder / name
            files[name].write_bytes(b"a picture")
        return StudyPage(files, study_front_rows(self.folder))

    def runs(self, uri: str | None = None) -> dict[int | None, Any]:
        """The study's runs by trial. No trial has two."""
        client = open_client(tracking_uri(self.folder, uri))
        experiment = client.get_experiment_by_name(experiment_name(self.folder.name))
        found = client.search_runs([experiment.experiment_id], f"tags.`{STUDY_ID_TAG}` LIKE '%'")
        trials = [r.data.tags.get("trial") for r in found]
        assert len(trials) == len(set(trials)), f"duplicate runs: {sorted(map(str, trials))}"
        return {None if t is None else int(t): r for t, r in zip(trials, found, strict=True)}

    def check_runs(self, uri: str | None = None, status: str = "FINISHED") -> dict[int | None, Any]:
        """Every run equals the study, and none is RUNNING."""
        runs = self.runs(uri)
        results = self.folder.measured()
        ranks = ranks_of(results, OBJECTIVES)
        parent = runs[None]
        assert parent.info.status == status
        assert set(runs) == {None, *(r.trial for r in results)}
        for r in results:
            run = runs[r.trial]
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert run.info.status == ("FAILED" if r.state == "failed" else "FINISHED")
            assert run.data.tags["state"] == r.state
            assert run.data.tags["study"] == self.folder.name
            assert run.data.tags.get("reason", "") == r.reason
            assert run.data.tags["method"] == run.data.params["method"] == r.method
            assert run.data.metrics == pytest.approx(expected_metrics(r, ranks))
            assert run.data.tags["pareto"] == str(ranks.get(r.trial) == 0).lower()
        return runs


def expected_metrics(result: TrialResult, ranks: dict[int, int]) -> dict[str, float]:
    """Of a trial that was stopped early no metric has the name of a measured accuracy."""
    if result.state == "failed":
        return {}
    if result.state == "finished":
        return {**result.values, "pareto_rank": ranks[result.trial]}
    costs = {k: v for k, v in result.values.items() if k not in ("top1", "top5")}
    return {**costs, "top1_estimate": result.values["top1"], "images_seen": result.images}


def finish(tracker: Tracker, study: GrowingStudy, ended: str = "all measured") -> bool:
    return tracker.finish(study.page(), ended=ended)


def wait_until_sent(tracker: Tracker, timeout_s: float = 120) -> None:
    """Until the sender thread has sent all entries."""
    deadline = time.monotonic() + timeout_s
    while tracker.pending:
        assert time.monotonic() < deadline, f"{tracker.pending} entries were not sent"
        time.sleep(0.01)
