"""Token pictures of a study's front: which members have one, and what stops them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.command_line import STUDY
from tests.dashboards.studies import write_study
from vitpareto.dashboards import study_token_pictures
from vitpareto.dashboards.study_token_pictures import token_pictures
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.objectives import objectives_named


def members(folder: StudyFolder) -> list[int]:
    front = front_of(folder.measured(), objectives_named(("top1", "gmacs")))
    return [r.trial for r in front if not r.is_reference]


def test_of_a_large_front_evenly_spaced_members_have_a_picture(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_study(tmp_path, "s", 60)
    front = members(folder)
    monkeypatch.setattr(study_token_pictures, "MAX_PICTURES", 3)
    assert len(front) > 3
    for trial in front:  # drawn before: nothing is traced
        folder.picture(trial).parent.mkdir(exist_ok=True)
        folder.picture(trial).write_bytes(b"drawn")
    drawn = token_pictures(folder, cache)
    assert len(drawn) == 3 and {front[0], front[-1]} <= set(drawn)


def test_without_the_model_of_the_study_a_warning_is_logged(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_study(tmp_path, "s", 10)  # has no weights
    with caplog.at_level(logging.WARNING, "vitpareto"):
        assert token_pictures(folder, cache) == {}
    assert "token pictures cannot be drawn" in caplog.text


def test_pictures_are_drawn_once(study_store: Path, cache: Path) -> None:
    folder = StudyFolder.find(str(study_store), STUDY)
    drawn = token_pictures(folder, cache)
    assert set(drawn) == set(members(folder))
    before = {path: path.stat().st_mtime_ns for path in drawn.values()}
    assert token_pictures(folder, cache) == drawn
    assert {path: path.stat().st_mtime_ns for path in drawn.values()} == before
