"""Protocols for what `clusters` and `dashboards` provide to the commands of `search`.

`search` does not import them; the root (`vitpareto.cli`) passes in their implementations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vitpareto.search.study.folder import StudyFolder
    from vitpareto.search.study.job_request import JobRequest
    from vitpareto.search.tracking.page import StudyPage
    from vitpareto.search.trials.nodes import Node


class Capacity(Protocol):
    """What a Ray cluster offers. `nodes` are those of a cluster that was joined."""

    @property
    def cpus(self) -> int: ...
    @property
    def gpus(self) -> int: ...
    @property
    def nodes(self) -> tuple[Node, ...]: ...


class Clusters(Protocol):
    """Where a search runs."""

    def local(self, workers: int | None) -> AbstractContextManager[Capacity]:
        """A Ray cluster on this machine until the block ends, with at least `workers` CPUs."""

    def join(self, address: str) -> AbstractContextManager[Capacity]:
        """The Ray cluster at an address, left when the block ends."""

    def store_inputs(self, job: JobRequest, package: Path, study: Path) -> JobRequest:
        """Copy the files of a submitted job from its package to the study.

        Returns the job with their new paths.
        """


class Presenter(Protocol):
    """How a study is shown at the end of a command."""

    def page(self, folder: StudyFolder, cache: str | None = None) -> StudyPage:
        """Draw the study's explorer and pictures. Returns what MLflow shows in addition to runs."""

    def show(self, folder: StudyFolder, page: StudyPage) -> None:
        """Print where the pictures are, the verdict and the front."""
