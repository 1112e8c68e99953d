"""Versions of installed packages."""

from __future__ import annotations

import importlib.metadata

import PIL
import pytest
import timm
import torch
import torchvision

from vitpareto.search import versions
from vitpareto.search.versions import (
    NOT_INSTALLED,
    installed_versions,
    package_versions,
    release_versions,
)


def test_versions_are_those_that_are_imported() -> None:
    found = package_versions("timm", "torch", "torchvision", "pillow", "no-such-package")
    assert found == {
        "timm": timm.__version__,
        "torch": torch.__version__,  # with its build
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "no-such-package": NOT_INSTALLED,
    }


def test_installed_versions_are_those_of_the_packages_metadata() -> None:
    found = installed_versions("torch", "timm", "no-such-package")
    assert found == {
        "torch": importlib.metadata.version("torch"),
        "timm": timm.__version__,
        "no-such-package": NOT_INSTALLED,
    }


def test_releases_are_equal_for_builds_of_the_same_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_with_build", {"torch": "2.15.0+cpu", "timm": "1.0"}.__getitem__)
    assert release_versions("torch", "timm") == {"torch": "2.15.0", "timm": "1.0"}
