"""Tables of costs and of published figures show what was measured, and cut no number."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console
from rich.table import Table

from vitpareto.dashboards.cost_tables import cost_notes, cost_records, cost_tables
from vitpareto.dashboards.csv_json import csv_text, json_lines
from vitpareto.dashboards.published_tables import (
    accuracy_table,
    figure_notes,
    figure_records,
    figures_table,
)
from vitpareto.search.compare import published
from vitpareto.search.compare.cost_table import CostRow, CostSettings, PublishedFigure, cost_rows
from vitpareto.search.compare.reproduction import ReproducedAccuracy, ReproducedRow, reproduce
from vitpareto.search.measure.latency import LatencyTarget


def text_of(table: Table, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue()


def cells(table: Table, name: str) -> list[str]:
    return next([str(c) for c in column.cells] for column in table.columns if column.header == name)


@pytest.fixture(scope="module")
def costs() -> list[CostRow]:
    models = ["vit_small_patch16_224", "vit_base_patch16_224"]
    return list(cost_rows(models, ["topk", "rajni", "ats", "tome"], [0.75], CostSettings(rounds=0)))


@pytest.fixture(scope="module")
def unmeasured() -> list[ReproducedRow]:
    return list(reproduce(published.rows(), None))


MEASURED = CostRow(
    "m", "topk", 0.5, "keep rate", "topk keep_rate=0.5", gmacs=2.28241, gmacs_low=2.28241,
    gmacs_high=2.28241, share=0.4953, fvcore_gmacs=2.28242, params_m=22.05, images_per_s=1234.5,
    speedup=1.87, speedup_low=1.85, speedup_high=1.9, peak_mb=310.2,
    published=(
        PublishedFigure(2.1368, "thop", 2.1363, "TRAM"), PublishedFigure(2.2, "mine", None, "me"),
    ),
    target=LatencyTarget("cpu", "eager", "float32", 64),
)  # fmt: skip


def test_there_is_one_table_per_model(costs: list[CostRow]) -> None:
    small, base = cost_tables(costs)
    assert str(small.title).startswith("vit_small_patch16_224, random weights")
    assert cells(small, "GMACs") == ["4.608", "3.202", "3.337", "<= 3.208", "3.139"]
    assert cells(base, "of dense")[:2] == ["100.0%", "69.7%"]
    assert cells(small, "published GFLOPs")[:2] == [
        "4.258 thop (ours 4.257)", "2.997 thop (ours 2.997)",
    ]  # fmt: skip
    assert set(cells(small, "FPS")) == {"—"}
    assert "fvcore" not in [c.header for c in small.columns]
    assert cells(small, "recipe")[3].endswith("; images decide")


def test_a_measured_row_has_all_columns(costs: list[CostRow]) -> None:
    (table,) = cost_tables([MEASURED])
    shown = text_of(table)
    for part in (
        "2.282",
        "49.5%",
        "22.05",
        "1234",
        "1.87 1.85–1.90",
        "310.2",
        "device cpu, runtime eager",
    ):
        assert part in shown, shown
    assert cells(table, "published GFLOPs") == ["2.137 thop (ours 2.136); 2.2 mine (ours —)"]
    assert cells(table, "fvcore") == ["2.282"]


def test_notes_explain_how_settings_were_found(costs: list[CostRow]) -> None:
    notes = cost_notes(costs)
    assert [note.split(" (")[0] for note in notes[:4]] == [
        "keep rate", "MACs nearest TopK's", "at most: nearest TopK's", "TopK's counts",
    ]  # fmt: skip
    assert "(rajni)" in notes[3]
    assert [note.split(": ")[0] for note in notes[4:]] == ["counter fvcore", "counter thop"]
    assert cost_notes([MEASURED])[0].startswith("keep rate (topk)")


def test_figures_of_another_model_name_the_difference() -> None:
    models = ["vit_small_patch16_224", "vit_base_patch16_224"]
    rows = list(cost_rows(models, ["topk", "patchmerger"], [0.75], CostSettings(rounds=0)))
    said = ", both of a model with class_token=False, global_pool=avg"
    small, base = (cells(table, "published GFLOPs") for table in cost_tables(rows))
    assert small[1:] == ["2.997 thop (ours 2.997)", f"2.909 thop (ours 2.907){said}"]
    assert base[2] == f"11.5 thop (ours 11.49){said}"
    assert [row.to_json()["published"].endswith(said) for row in cost_records(rows)] == [
        False,
        False,
        True,
    ] * 2
    (note,) = [note for note in cost_notes(rows) if "another model" in note]
    assert note.startswith(f"published for another model (patchmerger on {', '.join(models)}): the")
    assert note.endswith("0.7 to 1.1 % more")
    assert not [note for note in cost_notes(rows[:2]) if "another model" in note]


def test_records_of_costs(costs: list[CostRow]) -> None:
    plain = [json.loads(line) for line in json_lines(cost_records([*costs, MEASURED])).splitlines()]
    assert plain[1]["published"] == "2.9973 thop (ours 2.99682)"
    assert plain[3]["gmacs"] is None and plain[3]["gmacs_high"] == pytest.approx(3.208, abs=1e-3)
    assert csv_text(cost_records(costs)).count("\n") == 1 + len(costs)


# --- published figures


def test_published_costs_and_ours(unmeasured: list[ReproducedRow]) -> None:
    table = figures_table(unmeasured)
    assert len(cells(table, "theirs")) == sum(r.gflops is not None for r in published.rows())
    by = dict(zip(cells(table, "theirs"), zip(cells(table, "ours"), cells(table, "difference"),
                                              strict=True), strict=True))  # fmt: skip
    assert by["16.8808"] == ("16.8804", "-0.00%") and by["6.8"] == ("—", "—")


def test_without_data_no_accuracy_is_measured(unmeasured: list[ReproducedRow]) -> None:
    table = accuracy_table(unmeasured)
    ours = cells(table, "ours and its interval")
    assert len(ours) == 9 and set(ours) == {"not run: no data"}
    for name in ("difference", "dense ours", "images"):
        assert set(cells(table, name)) == {""}
    for row in figure_records(unmeasured):
        assert row.our_top1 is None and row.top1_why.startswith("not run: ")


def test_a_measured_accuracy(unmeasured: list[ReproducedRow]) -> None:
    tome = next(o for o in unmeasured if o.row.method == "tome" and o.row.top1 == 79.30)
    ours = ReproducedAccuracy(79.254, 78.9, 79.6, 81.43, 2.77, 49_990, 10)
    measured = ReproducedRow(tome.row, None, ours)
    table = accuracy_table([measured])
    values = [cells(table, c.header)[0] for c in table.columns]
    assert values == [
        "ToMe README (untrained)", "vit_small_patch16_224.augreg_in21k_ft_in1k", "tome r=13",
        "79.30", "79.25 (78.90–79.60)", "-0.05", "81.41", "81.43", "49990 (-10)",
    ]  # fmt: skip
    (plain,) = figure_records([measured])
    assert plain.our_top1 == 79.254 and plain.top1_why == "" and plain.images == 49_990
    assert plain.gflops_why == "not published"


def test_notes_explain_each_difference_once(unmeasured: list[ReproducedRow]) -> None:
    notes = figure_notes(unmeasured)
    assert len(set(notes)) == len(notes)
    said = "\n".join(notes)
    assert "counter torchprofile: " in said and "counter closed form" not in said
    assert "nvit on deit_base_distilled_patch16_224: cost not recomputed: dimensions" in said
    assert "patchmerger on vit_base_patch16_224, vit_small_patch16_224: the source's" in said


def test_no_number_is_cut(costs: list[CostRow], unmeasured: list[ReproducedRow]) -> None:
    """At the width of a pipe every number is printed in full."""
    for table in (*cost_tables([*costs, MEASURED]), figures_table(unmeasured),
                  accuracy_table(unmeasured)):  # fmt: skip
        shown = text_of(table)
        assert "…" not in shown
        for column in table.columns:
            if column.no_wrap:
                for cell in column.cells:
                    assert re.search(rf"(^|\s){re.escape(str(cell))}(\s|$)", shown), cell
