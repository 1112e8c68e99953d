"""The Grafana dashboard queries metrics that a search publishes on Ray's metrics page."""

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
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.ray_metrics import GAUGES, WINDOW_S, Metrics
from vitpareto.search.trials.run_study import run_study

pytestmark = pytest.mark.slow  # needs a Ray cluster

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "grafana" / "searches.json"


def queries(dashboard: dict[str, Any]) -> Iterator[str]:
    """The PromQL of all panels and variables."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def published_metrics(study: str) -> dict[tuple[str, str | None], float]:
    """The metrics of a study on Ray's metrics page of this node, by name and state."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with opener.open(address, timeout=30) as answer:
        page = answer.read().decode()
    lines = re.findall(r"^(ray_vitpareto_\w+){([^}]*)} (\S+)$", page, re.M)
    return {
        (name, dict(re.findall(r'(\w+)="([^"]*)"', labels)).get("state")): float(value)
        for name, labels, value in lines
        if f'study="{study}"' in labels
    }


@pytest.mark.timeout(400)
def test_every_query_finds_its_metric_after_a_search(
    tmp_path: Path, cache: Path, capacity: ClusterCapacity
) -> None:
    config = SearchConfig.of({
        "name": "metered", "trials": 6, "images": 60, "methods": "topk", "latency": "off",
        "certify": "off", "store": str(tmp_path), "cache": str(cache), "device": "cpu",
        "fixed": {"structure": "none"},
    })  # fmt: skip
    metrics = Metrics("metered", 2, lambda: 3)
    run_study(check_job(config), cpus=capacity.cpus, gpus=0, hooks=[metrics.on_result])
    expressions = list(queries(json.loads(DASHBOARD.read_text())))
    names = {name for query in expressions for name in re.findall(r"\bray_vitpareto_\w+", query)}
    assert names == {f"ray_{name}" for name in GAUGES}
    deadline = time.monotonic() + 240  # Ray publishes each metric every few seconds
    while True:
        found = published_metrics("metered")
        done = [found.get(("ray_vitpareto_trials", s), 0) for s in ("finished", "raced_out")]
        if sum(done) == 6 and names <= {name for name, _ in found}:
            break
        assert time.monotonic() < deadline, f"expected {sorted(names)}, found {found}"
        time.sleep(0.5)
    assert found["ray_vitpareto_outbox_depth", None] == 3
    assert found["ray_vitpareto_hypervolume", None] > 0
    assert 0 < found["ray_vitpareto_worker_busy_share", None] <= 1
    assert found["ray_vitpareto_images_per_second", None] > 0
    for query in expressions:
        assert re.findall(r"\b(\w+)=~", query) in ([], ["study"]), "only this label exists"


def test_rates_cover_the_last_minute(capacity: ClusterCapacity) -> None:
    now = [1000.0]
    metrics = Metrics("rated", 2, clock=lambda: now[0])
    result = TrialResult(0, "finished", RecordedRecipe(), "k", images=300, seconds=20.0)
    assert metrics.rates(now[0]) == (0.0, 0.0)
    now[0] += 10  # of a trial that began before the search only the part since then counts
    metrics.on_result(result, StudyProgress())
    assert metrics.rates(now[0]) == (0.5, 30.0)
    now[0] += 50
    metrics.on_result(replace(result, seconds=30.0), StudyProgress())
    assert metrics.rates(now[0]) == pytest.approx(((10 + 30) / 120, 10.0))
    now[0] += WINDOW_S + 1
    metrics.on_result(None, StudyProgress())
    assert metrics.rates(now[0]) == (0.0, 0.0)
