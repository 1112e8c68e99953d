"""The private parts of MLflow that this package depends on, tested with MLflow 3.17.

Format of the saved views in MLflow's web pages (an experiment tag
`mlflow.sharedViewState.ID`: name and times around the page's own state as JSON), location and
revisions of the database schema, and internal loggers. Nothing else in this package may rely on
undocumented behaviour of MLflow. `tests/dashboards/test_mlflow_pages.py` opens each view in a
browser, `tests/search/tracking/test_database.py` migrates a database.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: opens the experiment on its runs: MLflow's pages show it as a language model's otherwise
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
#: largest number of runs that a chart draws
CHART_RUNS = 100_000

_VIEW_TAG = "mlflow.sharedViewState."
_SECTION = "vitpareto"
_FILTERS: dict[str, Any] = {
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


@dataclass(frozen=True)
class SavedView:
    """A view of an experiment: `state` is the page's state as JSON."""

    name: str
    state: str


# ------------------------------------------------------------------------------------ saved views


def view_tags(
    views: Mapping[str, SavedView], tags: Mapping[str, str], now_ms: int
) -> dict[str, str]:
    """The experiment tags to set for an experiment to have these views.

    Args:
        views: the views by key, which opens a view as `?viewStateShareKey=KEY`.
        tags: the tags that the experiment has. A view that it has already needs no tag.
        now_ms: time in milliseconds since 1970.
    """
    missing = {}
    for key, view in views.items():
        try:
            stored = json.loads(tags.get(_VIEW_TAG + key, "{}"))
        except ValueError:
            stored = {}
        if (stored.get("name"), stored.get("state")) != (view.name, view.state):
            created = stored.get("createdAt", now_ms)
            missing[_VIEW_TAG + key] = json.dumps(
                {"name": view.name, "createdAt": created, "updatedAt": now_ms, "state": view.state}
            )
    return missing


def view_state(
    search_filter: str,
    order_by: str,
    columns: Sequence[str],
    charts: Sequence[Mapping[str, Any]],
    section: str,
) -> str:
    """The state of the runs page as JSON, with its charts in one section."""
    card_section = {
        "uuid": _SECTION,
        "name": section,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
        "columns": 2,
        "cardHeight": 400,
    }
    state = {
        "searchFilter": search_filter,
        "orderByKey": order_by,
        "orderByAsc": True,
        **_FILTERS,
        **_PAGE,
        "selectedColumns": list(columns),
        "compareRunCharts": list(charts),
        "compareRunSections": [card_section],
    }
    return json.dumps(state, sort_keys=True)


def column(kind: str, name: str) -> str:
    """The key of a column; `kind` is "metrics", "params" or "tags"."""
    return f"{kind}.`{name}`"


def scatter_chart(key: str, title: str, x: str, y: str) -> dict[str, Any]:
    """A scatter chart of two metrics."""
    return _chart(
        "SCATTER",
        key,
        displayName=title,
        xaxis={"key": x, "type": "METRIC"},
        yaxis={"key": y, "type": "METRIC"},
    )


def parallel_chart(
    key: str, title: str, params: Sequence[str], metrics: Sequence[str]
) -> dict[str, Any]:
    """Parallel coordinates of parameters and metrics."""
    return _chart(
        "PARALLEL",
        key,
        displayName=title,
        selectedParams=list(params),
        selectedMetrics=list(metrics),
        showAllRuns=True,
    )


def _chart(kind: str, key: str, **options: Any) -> dict[str, Any]:
    return {
        "uuid": f"vitpareto-{key}",
        "type": kind,
        "runsCountToCompare": CHART_RUNS,
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
        **options,
    }


# --------------------------------------------------------------------------------- database schema


@functools.cache
def schema_revisions() -> tuple[str, frozenset[str]]:
    """The newest database schema of the installed MLflow, and all schemas that it can migrate."""
    from alembic.script import ScriptDirectory

    spec = importlib.util.find_spec("mlflow")
    assert spec is not None and spec.submodule_search_locations
    migrations = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations"
    scripts = ScriptDirectory(str(migrations))
    (newest,) = scripts.get_heads()
    return newest, frozenset(revision.revision for revision in scripts.walk_revisions())


# ----------------------------------------------------------------------------------------- logging


def quiet_loggers() -> None:
    """Log warnings only. Imports mlflow, which takes seconds."""
    import mlflow.store.db.utils  # sets the level of its logger when it is imported

    for name in ("mlflow", "alembic", mlflow.store.db.utils.__name__):
        logging.getLogger(name).setLevel(logging.WARNING)
