"""What the MLflow run of a study shows in addition to its parameters and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitpareto.search.study.front_table import FrontRow


@dataclass(frozen=True)
class StudyPage:
    """Artifacts, table and description of a study's run.

    Attributes:
        artifacts: local files by artifact name, which may contain a folder.
        table: rows of the front, logged as `front.json`.
        note: description in Markdown. If empty, a note with the front is written.
    """

    artifacts: Mapping[str, Path] = field(default_factory=dict)
    table: Sequence[FrontRow] = ()
    note: str = ""
