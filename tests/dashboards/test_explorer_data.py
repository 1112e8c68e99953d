"""The data in the explorer page, read from the file without a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.dashboards.studies import write_study
from vitpareto.dashboards.explorer_data import published_results
from vitpareto.dashboards.explorer_page import explorer


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def test_every_measured_trial_is_in_the_page_and_no_failed_one(tmp_path: Path) -> None:
    folder = write_study(tmp_path, "s", 40)
    data = data_of(explorer([folder]))
    (study,) = data["studies"]
    states = {r.trial: r.state for r in folder.measured()}
    assert {t["number"]: t["state"] for t in study["trials"]} == {
        n: state for n, state in states.items() if state in ("finished", "raced_out")
    }
    assert [t["number"] for t in study["trials"] if t["dense"]] == [0]
    assert sum(t["knee"] for t in study["trials"]) <= 1
    assert {t["method"] for t in study["trials"] if t["control"]} >= {"random"}
    assert data["axes"]["x"][0] == "gmacs" and data["axes"]["y"] == ["top1"]
    (stopped, *_) = (t for t in study["trials"] if t["state"] == "raced_out")
    assert ["images", "100 of the search split, then stopped"] in stopped["details"]


def test_a_recipe_of_a_method_that_does_not_exist_any_more(tmp_path: Path) -> None:
    folder = write_study(tmp_path, "s", 3)
    path = folder.folder / "trials" / "000001.json"
    path.write_text(path.read_text().replace('"topk"', '"gone"'))
    (study,) = data_of(explorer([folder]))["studies"]
    (trial,) = (t for t in study["trials"] if t["number"] == 1)
    assert json.loads(trial["yaml"])["tokens"]["method"] == "gone"


def test_pictures_are_inside_the_page(tmp_path: Path) -> None:
    folder = write_study(tmp_path, "s", 3)
    picture = tmp_path / "1.png"
    picture.write_bytes(b"\x89PNG")
    (study,) = data_of(explorer([folder], {"s": {1: picture}}))["studies"]
    assert study["pictures"] == {"1": "data:image/png;base64,iVBORw=="}


def test_studies_of_other_images_are_not_comparable(tmp_path: Path) -> None:
    one = write_study(tmp_path, "one", 5)
    two, three = write_study(tmp_path, "two", 5), write_study(tmp_path, "three", 5, images="other")
    assert "one, two have the same model and images" in explorer([one, two])
    assert "one, three have different images" in explorer([one, three])


def test_published_results_of_a_model_are_trained_and_untrained() -> None:
    found = published_results("deit_small_patch16_224.fb_in1k")
    assert {p.trained for p in found} == {True, False}
    assert all(0 < p.values["gmacs"] <= 4.7 and 50 < p.values["top1"] < 100 for p in found)
    assert published_results("digits") == []
