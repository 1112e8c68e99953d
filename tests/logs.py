"""What the package logged: found by file, level and arguments instead of by wording."""

from __future__ import annotations

import logging

import pytest


def logged(
    caplog: pytest.LogCaptureFixture, module: str, level: int = logging.WARNING
) -> list[logging.LogRecord]:
    """The records that the file `<module>.py` made, at this level or above."""
    return [r for r in caplog.records if r.module == module and r.levelno >= level]
