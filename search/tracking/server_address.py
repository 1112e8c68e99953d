"""Which MLflow server a study is sent to, and how addresses and errors are shown to the user."""

from __future__ import annotations

import os
import re

from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.tracking.database import store_uri


def tracking_uri(folder: StudyFolder, uri: str | None) -> str:
    """The address of the server for a study.

    Args:
        folder: the study.
        uri: a server, "store" for the SQLite database of the study's store, or None for the server
            that the environment variable MLFLOW_TRACKING_URI names (the store if it is not set).
    """
    named = uri or os.environ.get("MLFLOW_TRACKING_URI") or "store"
    return named if named != "store" else store_uri(folder.folder.parent)


def shown_uri(uri: str) -> str:
    """The address without user name and password."""
    return re.sub(r"//[^/@\s]*@", "//", uri)


def error_text(error: Exception) -> str:
    """The root cause of an error on one short line, without passwords."""
    root: BaseException = error
    while inner := root.__cause__ or root.__context__:
        root = inner
    if isinstance(root, OSError) and root.strerror:
        return root.strerror  # for example "Connection refused", wrapped by several libraries
    text = shown_uri(str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
