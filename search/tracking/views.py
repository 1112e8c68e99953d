"""Saved views of a study's experiment in MLflow's pages: the front, all trials, failed trials."""

from __future__ import annotations

from collections.abc import Sequence

from vitpareto.search.study.objectives import ACCURACIES
from vitpareto.search.tracking.mlflow_internals import (
    SavedView,
    column,
    parallel_chart,
    scatter_chart,
    view_state,
)

#: key of the view of the front, which is opened as `?viewStateShareKey=KEY`
FRONT_VIEW = "vitpareto-front"
_SECTION = "Accuracy against cost"


def saved_views(objectives: Sequence[str]) -> dict[str, SavedView]:
    """The views of a study with these objectives, by key."""
    costs = [o for o in objectives if o not in ACCURACIES] or ["gmacs"]
    axes = [*costs, *(["latency_ms"] if "latency_ms" not in costs else ())]
    charts = [
        *(scatter_chart(cost, f"top1 against {cost}", x=cost, y="top1") for cost in axes),
        parallel_chart(
            "parallel", "recipes, costs and accuracy", ["method"], [*axes, "params_m", "top1"]
        ),
    ]
    method, by_cost = column("params", "method"), column("metrics", costs[0])
    columns = [*(column("metrics", name) for name in ("top1", *axes)), method]
    front = view_state(
        "tags.pareto = 'true'",
        by_cost,
        [
            *columns,
            column("metrics", "certified_top1"),
            column("metrics", "params_m"),
            column("tags", "recipe"),
        ],
        charts,
        _SECTION,
    )
    trials = view_state(
        "tags.trial LIKE '%'",
        by_cost,
        [
            *columns,
            column("tags", "state"),
            column("tags", "pareto"),
            column("metrics", "pareto_rank"),
            column("metrics", "images_seen"),
        ],
        charts,
        _SECTION,
    )
    failed = view_state(
        "attributes.status = 'FAILED'",
        method,  # ordered by time, MLflow would fold trials into the run of their study
        [method, column("tags", "reason"), column("tags", "recipe")],
        [],
        _SECTION,
    )
    return {
        FRONT_VIEW: SavedView("Pareto front", front),
        "vitpareto-trials": SavedView("All trials", trials),
        "vitpareto-failed": SavedView("Failed", failed),
    }
