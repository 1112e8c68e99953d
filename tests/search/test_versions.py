"""Versions of installed packages."""

from __future__ import annotations

import timm
import torch

from vitpareto.search.versions import NOT_INSTALLED, package_versions


def test_versions_are_those_that_are_imported() -> None:
    found = package_versions("timm", "torch", "no-such-package")
    assert found == {
        "timm": timm.__version__,
        "torch": torch.__version__,  # with its build
        "no-such-package": NOT_INSTALLED,
    }
