"""Fixtures that run `vitpareto ...` in this process, and one small study for tests that read it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from vitpareto import cli
from vitpareto.methods.engine.bad_input import BadInput, Code

#: the study that `study_store` holds
STUDY, TRIALS = "s", 6


@dataclass(frozen=True)
class Result:
    """What a command printed, how it exited, and the error that it reported."""

    code: int
    out: str
    err: str
    error: Exception | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Standard output as JSON, one object per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    def is_refused(self, code: Code | None = None, **details: Any) -> BadInput:
        """Assert that the command was refused in one message, with this code and these details."""
        assert self.code == cli.REFUSED, self.err or self.out
        assert isinstance(self.error, BadInput), self.error
        assert f"error: {self.error}\n" in self.err and "Traceback" not in self.err
        if code is not None:
            assert self.error.code == code, f"{self.error.code}: {self.error}"
        found = {k: self.error.details.get(k) for k in details}
        assert found == details, f"{found}: {self.error}"
        return self.error


Run = Callable[..., Result]


def run_command(*arguments: object) -> Result:
    """Run `vitpareto ...` through its entry point."""
    errors: list[Exception] = []
    reported = cli._reported

    def spy(error: Exception, debug: bool) -> int:
        errors.append(error)
        return reported(error, debug)

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vitpareto", *map(str, arguments)])
        patch.setattr(cli, "_reported", spy)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as exited,
        ):
            cli.main()
    code = exited.value.code
    return Result(
        code if isinstance(code, int) else 0,
        out.getvalue(),
        err.getvalue(),
        errors[0] if errors else None,
    )


@pytest.fixture
def command() -> Run:
    return run_command


@dataclass(frozen=True)
class MadeStudy:
    """A store with one study, and what the search that made it printed. untouched: a copy of the
    store that no command reads while a test copies it.
    """

    store: Path
    untouched: Path
    result: Result


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of this run of the tests, the same for all workers of pytest-xdist."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def made_study(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> MadeStudy:
    """The study `s`; tests do not change it. The first worker that needs it makes it for all."""
    root = shared_folder(tmp_path_factory) / "made-study"
    root.mkdir(exist_ok=True)
    store, untouched, printed = root / "studies", root / "untouched", root / "printed.json"
    with FileLock(root / "lock"):
        if not printed.exists():
            for left in (store, untouched):  # by a worker that failed
                shutil.rmtree(left, ignore_errors=True)
            result = _search(store, root / "job.yaml", cache)
            assert result.code == 0, result.err
            shutil.copytree(store, untouched)
            printed.write_text(json.dumps([result.code, result.out, result.err]))
    return MadeStudy(store, untouched, Result(*json.loads(printed.read_text()), error=None))


def _search(store: Path, job: Path, cache: Path) -> Result:
    """One worker: every further one imports torch first, which takes longer than the trials."""
    job.write_text("trials: 100\nimages: 40\nmethods: [topk, tome]\nlatency: off\n")
    return run_command("search", job, "--set", f"trials={TRIALS}", "--name", STUDY,
                       "--workers", 1, "--store", store, "--cache", cache)  # fmt: skip


@pytest.fixture
def study_store(made_study: MadeStudy) -> Path:
    """The store of `made_study`."""
    return made_study.store


@pytest.fixture
def own_store(made_study: MadeStudy, tmp_path: Path) -> Path:
    """A copy of `study_store`, for tests that change it."""
    return Path(shutil.copytree(made_study.untouched, tmp_path / "studies"))
