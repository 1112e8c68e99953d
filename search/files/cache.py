"""The cache folder of the current user."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def default_cache() -> Path:
    """`VITPARETO_CACHE` if set, otherwise the platform's cache folder for this program.

    `XDG_CACHE_HOME` is respected on every platform. Without it, the folder is
    ~/Library/Caches/vitpareto on macOS and ~/.cache/vitpareto on Linux.
    """
    if os.environ.get("VITPARETO_CACHE"):
        return Path(os.environ["VITPARETO_CACHE"]).expanduser().absolute()
    return platformdirs.user_cache_path("vitpareto")
