"""Fixtures of this package: an image folder and a private cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.data.image_folders import (
    make_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "pets", {"cat": 60, "ant": 40, "dog": 20})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
