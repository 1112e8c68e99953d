"""The cache folder: environment variables first, then the platform's."""

from __future__ import annotations

from pathlib import Path

import platformdirs.macos
import platformdirs.unix
import pytest

from vitpareto.search.files.cache import default_cache

PLATFORMS = {"linux": platformdirs.unix.Unix, "darwin": platformdirs.macos.MacOS}
FOLDERS = {"linux": Path(".cache/vitpareto"), "darwin": Path("Library/Caches/vitpareto")}


@pytest.fixture(params=PLATFORMS)
def platform(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    name = str(request.param)
    monkeypatch.setattr(platformdirs, "PlatformDirs", PLATFORMS[name])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VITPARETO_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return name


def test_the_platform_decides(platform: str, tmp_path: Path) -> None:
    assert default_cache() == tmp_path / FOLDERS[platform]


def test_xdg_cache_home_is_respected_on_every_platform(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "vitpareto"


def test_vitpareto_cache_comes_first(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("VITPARETO_CACHE", "~/mine")
    assert default_cache() == tmp_path / "mine"
    monkeypatch.setenv("VITPARETO_CACHE", "")
    assert default_cache() == tmp_path / "xdg" / "vitpareto"
