"""Saved views of a study's experiment in MLflow's pages: the front, all trials, those that failed.

MLflow keeps a view as a tag of the experiment (`mlflow.sharedViewState.ID`): an envelope with a
name and times around the page's own state as JSON. The format is internal to MLflow's pages, taken
from 3.17; `tests/dashboards/test_mlflow_pages.py` opens each view in a browser.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

TAG = "mlflow.sharedViewState."
#: under which the view of the front is opened: ...?viewStateShareKey=KEY
FRONT = "vitpareto-front"
#: charts draw as many runs as this at most
MOST = 100_000

_FACETS: dict[str, Any] = {
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "datasetsFilter": [],
    "modelVersionFilter": "All Runs",
}
_PAGE: dict[str, Any] = {
    "columnOrder": [],
    "columnWidths": {},
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
    "runsVisibilityMap": {},
    "runsHiddenMode": "SHOW_ALL",
    "viewMaximized": False,
    "runListHidden": False,
    "isAccordionReordered": False,
    "groupBy": None,
    "groupsExpanded": {},
    "autoRefreshEnabled": True,
    "useGroupedValuesInCharts": True,
    "hideEmptyCharts": True,
    "globalLineChartConfig": {},
    "chartsSearchFilter": "",
}


def saved_views(objectives: Sequence[str]) -> dict[str, tuple[str, str]]:
    """By key: a view's name, and the page's state as JSON. objectives: of the study."""
    costs = [o for o in objectives if o not in ("top1", "top5")] or ["gmacs"]
    axes = [*costs, *(["latency_ms"] if "latency_ms" not in costs else ())]
    charts = [*(_scatter(cost) for cost in axes), _parallel(axes)]
    columns = [_metric("top1"), *(_metric(cost) for cost in axes), _param("method")]
    front = _state(
        "tags.pareto = 'true'",
        _metric(costs[0]),
        [*columns, _metric("certified_top1"), _metric("params_m"), _tag("recipe")],
        charts,
    )
    everything = _state(
        "tags.trial LIKE '%'",
        _metric(costs[0]),
        [*columns, _tag("state"), _tag("pareto"), _metric("pareto_rank"), _metric("images_seen")],
        charts,
    )
    failed = _state(
        "attributes.status = 'FAILED'",
        _param("method"),  # by time, MLflow would fold trials into their study's run
        [_param("method"), _tag("reason"), _tag("recipe")],
        [],
    )
    return {
        FRONT: ("Pareto front", front),
        "vitpareto-trials": ("All trials", everything),
        "vitpareto-failed": ("Failed", failed),
    }


def view_tags(objectives: Sequence[str], known: Mapping[str, str], now_ms: int) -> dict[str, str]:
    """The tags to set so that an experiment with `known` tags has the views: none where it has."""
    wanted = {}
    for key, (name, state) in saved_views(objectives).items():
        try:
            there = json.loads(known.get(TAG + key, "{}"))
        except ValueError:
            there = {}
        if (there.get("name"), there.get("state")) != (name, state):
            made = there.get("createdAt", now_ms)
            wanted[TAG + key] = json.dumps(
                {"name": name, "createdAt": made, "updatedAt": now_ms, "state": state}
            )
    return wanted


def _metric(name: str) -> str:
    return f"metrics.`{name}`"


def _param(name: str) -> str:
    return f"params.`{name}`"


def _tag(name: str) -> str:
    return f"tags.`{name}`"


def _state(
    filtered: str, order: str, columns: Sequence[str], charts: Sequence[Mapping[str, Any]]
) -> str:
    section = {"uuid": "vitpareto", "name": "Accuracy against cost", "display": True,
               "isReordered": False, "deleted": False, "isGenerated": False, "columns": 2,
               "cardHeight": 400}  # fmt: skip
    state = {
        "searchFilter": filtered,
        "orderByKey": order,
        "orderByAsc": True,
        **_FACETS,
        **_PAGE,
        "selectedColumns": list(columns),
        "compareRunCharts": list(charts),
        "compareRunSections": [section],
    }
    return json.dumps(state, sort_keys=True)


def _card(kind: str, key: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": f"vitpareto-{key}",
        "type": kind,
        "runsCountToCompare": MOST,
        "metricSectionId": "vitpareto",
        "deleted": False,
        "isGenerated": False,
        **more,
    }


def _scatter(cost: str) -> dict[str, Any]:
    return _card(
        "SCATTER",
        cost,
        displayName=f"top1 against {cost}",
        xaxis={"key": cost, "type": "METRIC"},
        yaxis={"key": "top1", "type": "METRIC"},
    )


def _parallel(costs: Sequence[str]) -> dict[str, Any]:
    return _card(
        "PARALLEL",
        "parallel",
        displayName="recipes, costs and accuracy",
        selectedParams=["method"],
        selectedMetrics=[*costs, "params_m", "top1"],
        showAllRuns=True,
    )
