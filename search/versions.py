"""Versions of installed packages, for provenance and for checks that nodes run the same."""

from __future__ import annotations

import importlib.metadata

#: in place of the version of a package that is not installed
NOT_INSTALLED = "not installed"


def package_versions(*packages: str) -> dict[str, str]:
    """Versions by package name; NOT_INSTALLED where there is none. torch's includes its build."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    if package == "torch":
        import torch  # heavy, and the package metadata lacks the build (+cu126, +cpu)

        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
