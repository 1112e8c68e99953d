"""MLflow's pages in a browser: the saved views of a study, and the explorer in its frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Tab
from tests.dashboards.studies import write_study
from vitpareto.dashboards.explorer_page import write_explorer
from vitpareto.dashboards.mlflow_server import Served, serve
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.front_table import study_front_rows
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.database import store_uri
from vitpareto.search.tracking.page import StudyPage
from vitpareto.search.tracking.sync import sync
from vitpareto.search.tracking.views import saved_views

pytestmark = pytest.mark.slow  # needs a browser and an MLflow server

#: MLflow's pages load 100 runs at a time
TRIALS = 90


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    folder = write_study(tmp_path_factory.mktemp("store"), "deit-s", TRIALS)
    page = write_explorer([folder], folder.folder / "explorer.html")
    sync(folder, page=StudyPage({page.name: page}, study_front_rows(folder)))
    return folder


@pytest.fixture(scope="module")
def served(study: StudyFolder) -> Iterator[Served]:
    with serve(study.folder.parent, study.name) as served:
        yield served


def names(tab: Tab) -> set[int]:
    """The trials whose runs the page lists."""
    found = tab.page.locator("a[href*='/runs/']").all_text_contents()
    return {int(text.split()[0]) for text in found if text.split() and text.split()[0].isdigit()}


def test_the_view_of_the_front_lists_and_draws_its_members(
    tab: Tab, served: Served, study: StudyFolder
) -> None:
    tab.page.goto(served.view)
    tab.page.wait_for_selector("text=Pareto front")
    front = {r.trial for r in front_of(study.trials.all(), objectives_named(("top1", "gmacs")))}
    tab.page.wait_for_selector("text=matching runs")
    tab.page.wait_for_selector(".js-plotly-plot .scatterlayer .point")
    shown = tab.page.locator("text=matching runs").first.text_content() or ""
    tab.screenshot("mlflow-front")
    assert names(tab) == front and shown.startswith(str(len(front)))
    titles = tab.page.locator(".js-plotly-plot .xtitle").all_text_contents()
    assert {"gmacs", "latency_ms"} <= set(titles)
    points = tab.page.locator(".js-plotly-plot").first.locator(".scatterlayer .point")
    assert points.count() == len(front)
    assert (
        tab.page.locator("text=recipes, costs and accuracy").count()
        or tab.page.locator("text=Parallel").count()
    ), "parallel coordinates"


@pytest.mark.parametrize("key", saved_views(("top1", "gmacs")))
def test_every_view_lists_its_runs_and_columns(
    tab: Tab, served: Served, study: StudyFolder, key: str
) -> None:
    name = saved_views(("top1", "gmacs"))[key].name
    tab.page.set_viewport_size({"width": 2400, "height": 1000})  # hidden columns are not rendered
    tab.page.goto(served.view.replace("vitpareto-front", key).replace("CHART", "TABLE"))
    tab.page.wait_for_selector(f"text={name}")
    tab.page.wait_for_selector("text=matching runs")
    results = study.trials.all()
    failed = [r for r in results if r.state == "failed"]
    front = front_of(results, objectives_named(("top1", "gmacs")))
    many = {"Pareto front": len(front), "All trials": TRIALS, "Failed": len(failed)}[name]
    tab.page.wait_for_function(
        "(n) => [...document.querySelectorAll('*')].some((e) => e.children.length < 2 "
        "&& new RegExp(`^${n} matching runs?$`).test(e.textContent.trim()))",
        arg=many,
    )
    columns = {"Pareto front": "latency_ms", "All trials": "pareto_rank", "Failed": "reason"}
    tab.page.wait_for_selector(f"[role=columnheader] >> text={columns[name]}")
    heads = tab.page.locator("[role=columnheader]").all_text_contents()
    tab.screenshot(f"mlflow-{key}")
    assert any(columns[name] in head for head in heads), heads


def test_the_explorer_works_in_the_frame_of_mlflow(tab: Tab, served: Served) -> None:
    tab.page.goto(served.explorer)
    frame = tab.page.frame_locator("iframe")
    frame.locator("#plot .scatterlayer .point").first.wait_for()
    assert frame.locator("#verdict").inner_text().startswith("At ")
    frame.locator("#front tbody tr:nth-child(1) button").click()
    frame.locator("#front tbody tr:nth-child(2) button").click()
    assert frame.locator(".pin").count() == 2
    frame.locator(".pin button[data-copies^=vitpareto]").first.click()
    said = frame.locator("#status")
    said.filter(has_text="vitpareto export deit-s --trial").wait_for()
    tab.screenshot("mlflow-explorer")


def test_a_damaged_view_is_restored_by_sync(study: StudyFolder, tmp_path: Path) -> None:
    client = open_client(store_uri(study.folder.parent))
    experiment = client.get_experiment_by_name("vitpareto/deit-s")
    (key,) = [k for k in experiment.tags if k.endswith("vitpareto-failed")]
    client.set_experiment_tag(experiment.experiment_id, key, "{half of a vie")
    sync(study)
    assert '"Failed"' in client.get_experiment(experiment.experiment_id).tags[key]
