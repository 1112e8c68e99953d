"""Grafana's dashboard asks for numbers that a running search really shows on Ray's metrics page."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.progress import StudyProgress
from vitpareto.search.study.results import TrialResult
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.ray_metrics import GAUGES, WINDOW_S, Metrics
from vitpareto.search.trials.run_study import run_study

BOARD = Path(__file__).parents[2] / "dashboards" / "grafana" / "searches.json"


def queries(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def page() -> str:
    """Ray's metrics page of this node."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with opener.open(address, timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.timeout(240)
def test_every_query_finds_its_number_on_the_page_of_a_running_search(
    tmp_path: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    config = SearchConfig.of({
        "name": "metered", "trials": 6, "images": 60, "methods": "topk", "latency": "off",
        "certify": "off", "store": str(tmp_path), "cache": str(cache), "device": "cpu",
        "fixed": {"structure": "none"},
    })  # fmt: skip
    metrics = Metrics("metered", 2, lambda: 3)
    run_study(check_job(config), cpus=capacity.cpus, gpus=0, hooks=[metrics.on_result])
    asked = list(queries(json.loads(BOARD.read_text())))
    names = {name for query in asked for name in re.findall(r"\bray_vitpareto_\w+", query)}
    assert names == {f"ray_{name}" for name in GAUGES}, "each number is shown, and no other"
    deadline = time.monotonic() + 90  # Ray reports every few seconds, and each number by itself
    while True:
        shown = {
            (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)).get("state")): float(value)
            for name, labels, value in re.findall(
                r"^(ray_vitpareto_\w+){([^}]*)} (\S+)$", page(), re.M
            )
            if 'study="metered"' in labels
        }
        ended = [shown.get(("ray_vitpareto_trials", s), 0) for s in ("finished", "raced_out")]
        if sum(ended) == 6 and names <= {name for name, _ in shown}:
            break
        assert time.monotonic() < deadline, f"of {sorted(names)} there is {shown}"
        time.sleep(1)
    assert shown["ray_vitpareto_outbox_depth", None] == 3
    assert shown["ray_vitpareto_hypervolume", None] > 0
    assert 0 < shown["ray_vitpareto_worker_busy_share", None] <= 1
    assert shown["ray_vitpareto_images_per_second", None] > 0
    for query in asked:
        assert re.findall(r"\b(\w+)=~", query) in ([], ["study"]), "a label that there is"


def test_rates_are_of_the_last_minute_and_of_what_lies_in_it(capacity: ClusterCapacity) -> None:
    now = [1000.0]
    metrics = Metrics("rated", 2, clock=lambda: now[0])
    one = TrialResult(0, "finished", {}, "k", images=300, seconds=20.0)
    assert metrics.rates(now[0]) == (0.0, 0.0)
    now[0] += 10  # a trial that began before the search was seen counts no more than there was
    metrics.on_result(one, StudyProgress())
    assert metrics.rates(now[0]) == (0.5, 30.0)
    now[0] += 50
    metrics.on_result(replace(one, seconds=30.0), StudyProgress())
    assert metrics.rates(now[0]) == pytest.approx(((10 + 30) / 120, 10.0))
    now[0] += WINDOW_S + 1
    metrics.on_result(None, StudyProgress())
    assert metrics.rates(now[0]) == (0.0, 0.0)
