"""Versions of installed packages, for provenance, cache keys and checks that nodes run the same.

Three spellings are on disk, and stay as they are: with the build, as installed, and the release.
"""

from __future__ import annotations

import importlib
import importlib.metadata

#: in place of the version of a package that is not installed
NOT_INSTALLED = "not installed"
#: packages whose metadata lacks the build (+cu132, +cpu) that their module states
_BUILT = ("torch", "torchvision")


def package_versions(*packages: str) -> dict[str, str]:
    """Versions by package name, with the build of torch and torchvision; NOT_INSTALLED for none."""
    return {name: _with_build(name) for name in packages}


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions by package name as the installed packages' metadata states them."""
    return {name: _installed(name) for name in packages}


def release_versions(*packages: str) -> dict[str, str]:
    """Versions by package name without any build: equal for builds of the same sources."""
    return {
        name: version.partition("+")[0] for name, version in package_versions(*packages).items()
    }


def _with_build(package: str) -> str:
    if package in _BUILT and _installed(package) != NOT_INSTALLED:
        # imported here because it is heavy
        return str(importlib.import_module(package).__version__)
    return _installed(package)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED
