"""The explorer in a browser, opened from a file and without network requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import Tab
from tests.dashboards.studies import write_study
from tests.refusals import refused
from vitpareto.dashboards.explorer_page import explorer, write_explorer
from vitpareto.search.errors import Code, UserError
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import Front, front_of, reference_of, reference_point
from vitpareto.search.study.job_request import JobRequest
from vitpareto.search.study.objectives import objectives_named

AXES = objectives_named(("top1", "gmacs"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return write_study(tmp_path_factory.mktemp("store"), "deit-s", 1000)


@pytest.fixture(scope="module")
def page(study: StudyFolder) -> Path:
    return write_explorer([study], study.folder / "explorer.html")


def opened(tab: Tab, page: Path) -> Tab:
    tab.page.goto(page.as_uri())
    tab.page.wait_for_selector("#plot .scatterlayer .point")
    return tab


def rows(tab: Tab) -> list[int]:
    return [int(text.split()[0]) for text in tab.texts("#front tbody tr td:first-child")]


@pytest.mark.slow
def test_it_shows_the_front_without_requests(tab: Tab, page: Path, study: StudyFolder) -> None:
    opened(tab, page)
    front = front_of(study.measured(), AXES)
    assert rows(tab) == [r.trial for r in sorted(front, key=lambda r: r.values["gmacs"])]
    assert tab.texts("#verdict")[0].startswith("At ")
    assert "1000" not in tab.texts("#about")[0]  # failed trials are not counted
    measured = study.measured()
    shown = tab.run("TRIALS.filter(shown).length")
    assert shown == sum(r.state in ("finished", "raced_out") for r in measured)
    tab.screenshot("explorer")
    assert tab.errors == []
    assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data", "blob"}


@pytest.mark.slow
def test_shares_equal_the_library_hypervolumes(tab: Tab, page: Path, study: StudyFolder) -> None:
    """The page computes them itself because the axes can be changed."""
    opened(tab, page)
    results = study.measured()
    dense = reference_of(results)
    assert dense is not None

    def volume(some: list) -> float:
        front = Front(AXES, reference_point({o.name: dense.values[o.name] for o in AXES}, AXES))
        for r in some:
            front.add(r.trial, r.values)
        return front.hypervolume()

    finished = [r for r in results if r.state == "finished"]
    for method in ("tome", "topk", "evit", "random"):
        own = volume([r for r in finished if r.method == method])
        text = tab.page.locator(f"#groups .share[data-group={method}]").inner_text()
        assert text == f"{100 * own / volume(finished):.1f} %"


@pytest.mark.slow
def test_clicks_pin_two_trials_side_by_side(tab: Tab, page: Path) -> None:
    opened(tab, page)
    numbers = rows(tab)
    for row in (1, 3):
        tab.page.click(f"#front tbody tr:nth-child({row}) button")
    titles = tab.texts(".pin h3")
    assert [t.split(":")[0] for t in titles] == [f"Atrial {numbers[0]}", f"Btrial {numbers[2]}"]
    gain = tab.run("value(state.pins[1], 'top1') - value(state.pins[0], 'top1')")
    assert f"+{gain:.2f}" in tab.texts(".pin:nth-child(2) td")
    command = tab.page.locator(".pin:nth-child(2) button[data-copies^=vitpareto]")
    assert (
        command.get_attribute("data-copies")
        == f"vitpareto export deit-s --trial {numbers[2]} --out bundle/"
    )
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    command.click()
    tab.page.wait_for_function("document.querySelector('#status').textContent.startsWith('Copied')")
    # a click on a mark of the plot: the third pin replaces the first
    tab.run(
        "document.getElementById('plot').emit('plotly_click', {points: [{customdata: "
        f"TRIALS.findIndex((t) => t.number === {numbers[1]})}}]}})"
    )
    assert [t.split(" ")[-2] for t in tab.texts(".pin h3")] == [f"{numbers[2]}:", f"{numbers[1]}:"]
    tab.screenshot("explorer-pinned")


@pytest.mark.slow
def test_the_mouse_over_a_trial_shows_its_recipe(tab: Tab, page: Path) -> None:
    opened(tab, page)
    numbers = rows(tab)
    position = tab.run(
        f"""(() => {{ const t = TRIALS.find((t) => t.number === {numbers[0]});
        const p = document.getElementById('plot'), l = p._fullLayout, r = p.getBoundingClientRect();
        return [r.left + l.xaxis._offset + l.xaxis.d2p(value(t, 'gmacs')),
                r.top + l.yaxis._offset + l.yaxis.d2p(value(t, 'top1'))]; }})()"""
    )
    tab.page.mouse.move(position[0] - 30, position[1])
    tab.page.mouse.move(*position, steps=5)
    tab.page.wait_for_selector(".hoverlayer .hovertext")
    said = " ".join(tab.page.locator(".hoverlayer .hovertext").all_text_contents())
    assert f"trial {numbers[0]}" in said and "GMACs" in said


@pytest.mark.slow
def test_keys_move_from_trial_to_trial_and_pin(tab: Tab, page: Path) -> None:
    opened(tab, page)
    tab.page.focus("#plot")
    for key in ("ArrowRight", "ArrowRight", "Enter", "End", "Enter"):
        tab.page.keyboard.press(key)
    order = tab.run(
        "TRIALS.filter(shown).sort((a, b) => value(a, 'gmacs') - value(b, 'gmacs') || "
        "value(a, 'top1') - value(b, 'top1')).map((t) => t.number)"
    )
    pinned = tab.run("state.pins.map((t) => t.number)")
    assert pinned == [order[1], order[-1]]
    tab.page.keyboard.press("Escape")
    assert tab.run("state.pins.length") == 0 and tab.texts(".pin") == []


@pytest.mark.slow
def test_filters_by_method_and_budget(tab: Tab, page: Path) -> None:
    opened(tab, page)
    everything = rows(tab)
    tab.page.uncheck("#groups input[value=tome]")
    assert tab.run("TRIALS.filter(shown).some((t) => t.method === 'tome')") is False
    assert set(rows(tab)) < set(everything)
    tab.page.fill("#budget", "2.5")
    assert tab.run("Math.max(...TRIALS.filter(shown).map((t) => value(t, 'gmacs')))") <= 2.5
    tab.page.fill("#budget", "0.01")
    assert tab.texts("#table-head") == ["Front: no trial within this budget"]
    tab.page.click("#reset")
    assert rows(tab) == everything


@pytest.mark.slow
def test_the_cost_may_be_latency(tab: Tab, page: Path, study: StudyFolder) -> None:
    opened(tab, page)
    tab.page.select_option("#x", "latency_ms")
    finished = [r for r in study.measured() if "latency_ms" in r.values]
    wanted = front_of(finished, objectives_named(("top1", "latency_ms")))
    assert set(rows(tab)) == {r.trial for r in wanted}
    title = tab.page.locator("#plot .xtitle").text_content()
    assert title == "latency per batch, p50, ms" and tab.errors == []


@pytest.mark.slow
def test_controls_are_hollow_and_methods_differ_in_shape_and_colour(tab: Tab, page: Path) -> None:
    opened(tab, page)
    looks = tab.run("D.styles")
    methods = [looks[m] for m in ("tome", "topk", "evit")]
    assert len({m["colour"] for m in methods}) == len({m["shape"] for m in methods}) == 3
    assert looks["random"]["control"] and not any(m["control"] for m in methods)
    names = tab.run("document.getElementById('plot').data.map((t) => t.name || '')")
    assert {"front", "front of the controls", "dense model", "knee"} <= set(names)


@pytest.mark.slow
def test_published_points_show_whether_they_are_trained(
    tab: Tab,
    tmp_path: Path,
) -> None:
    folder = write_study(tmp_path, "vit-s", 40, model="deit_small_patch16_224")
    for r in folder.trials.all():  # published results have 1,000 classes
        path = folder.folder / "trials" / f"{r.trial:06d}.json"
        path.write_text(
            path.read_text().replace('"provenance": {', '"provenance": {"classes": 1000')
        )
    opened(tab, write_explorer([folder], tmp_path / "p.html"))
    kinds = tab.run(
        "document.getElementById('plot').data.filter((t) => (t.name || '').startsWith('published'))"
        ".map((t) => [t.name, t.marker.symbol])"
    )
    assert len(kinds) == 2 and kinds[0][1] != kinds[1][1]
    assert write_study(tmp_path, "ten", 10, model="deit_small_patch16_224").name == "ten"
    assert '"published": []' in explorer([StudyFolder(tmp_path / "ten")])


@pytest.mark.slow
def test_several_studies_are_overlaid(
    tab: Tab,
    tmp_path: Path,
) -> None:
    folders = [write_study(tmp_path, name, 60, seed=i) for i, name in enumerate(("one", "two"))]
    opened(tab, write_explorer(folders, tmp_path / "c.html"))
    assert tab.texts("#verdict") == ["one, two have the same model and images"]
    names = tab.run("document.getElementById('plot').data.map((t) => t.name || '')")
    assert {"front of one", "front of two"} <= set(names)
    wanted = sum(len(front_of(f.measured(), AXES)) for f in folders)
    assert len(rows(tab)) == wanted
    tab.page.uncheck("#groups input[value=one]")
    assert set(tab.texts("#front tbody td:nth-child(2)")) == {"two"}
    tab.screenshot("compare")
    assert tab.errors == []


@pytest.mark.slow
def test_text_of_a_study_is_escaped(tab: Tab, tmp_path: Path) -> None:
    folder = write_study(tmp_path, "s", 20, model="</script><img src=x onerror=alert(1)>")
    opened(tab, write_explorer([folder], tmp_path / "x.html"))
    assert "<img" in tab.texts("#about")[0] and tab.errors == []


def test_studies_without_trials_are_refused(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "none")
    folder.create()
    folder.identity.settle({"model": "digits"})
    folder.write_job(
        JobRequest({"objectives": ["top1", "gmacs"], "model": "digits", "data": "digits"})
    )
    with refused(Code.EMPTY, UserError, studies=("none",)):
        explorer([folder])
