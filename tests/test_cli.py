"""The command `vitpareto` itself: help, errors, exit codes, and what a start imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import typer

from tests.command_line import Run
from tests.test_older_version import RECORDED
from vitpareto import cli
from vitpareto.methods.engine.bad_input import Code

COMMANDS = [command.name for command in cli.app.registered_commands]


def test_every_command_is_wired() -> None:
    assert sorted(map(str, COMMANDS)) == sorted([
        "search", "demo", "recover", "sync", "measure", "export", "verify", "profile", "methods",
        "finetune", "train-demo", "schema", "front", "trials", "report", "compare", "show",
        "table", "reproduce", "bench", "ui", "submit", "jobs", "logs", "stop",
    ])  # fmt: skip
    assert [group.name or group.typer_instance.info.name  # type: ignore[union-attr]
            for group in cli.app.registered_groups] == ["cluster"]  # fmt: skip


@pytest.mark.parametrize("name", [*COMMANDS, "cluster local"])
def test_every_command_has_help_with_an_example(command: Run, name: str) -> None:
    result = command(*name.split(), "--help")
    text = result.out.split("Usage", 1)[1].split("\n", 1)[1]
    assert result.code == 0 and f"vitpareto {name}" in text


def test_version(command: Run) -> None:
    assert command("--version").out.strip().count(".") == 2


def test_an_error_is_one_message(command: Run, tmp_path: Path) -> None:
    command("front", "nosuch", "--store", tmp_path).is_refused(Code.NOT_FOUND, study="nosuch")


def test_debug_shows_the_traceback(command: Run, tmp_path: Path) -> None:
    result = command("front", "nosuch", "--store", tmp_path, "--debug")
    assert result.code == cli.FAILED and "Traceback" in result.err


def test_a_bad_command_line_exits_with_2(command: Run) -> None:
    for arguments in (("serach",), ("search", "--trials", "many"), ("search", "--no-such-option")):
        result = command(*arguments)
        assert result.code == cli.REFUSED and "Traceback" not in result.err, arguments


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (PermissionError("denied"), 2),
        (RuntimeError("a bug"), 1),
        (typer.Exit(7), 7),
    ],
    ids=repr,
)
def test_exit_codes(
    command: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    from vitpareto.search.study.folder import StudyFolder

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(StudyFolder, "find", fails)
    result = command("trials", "s")
    assert result.code == code and "Traceback" not in result.err


#: commands that run to their end where Ray and Optuna cannot be imported
LIGHT_COMMANDS = {
    "help": ("--help",),
    "table": ("table", "--methods", "topk", "--rounds", "0"),
    "measure": ("measure", "--recipe", "RECIPE", "--images", "10", "--cache", "CACHE"),
    "profile": ("profile", "--points", "2", "--rounds", "1", "--out", "FILE.json"),
    "bench": ("bench", "BUNDLE", "--batches", "1", "--rounds", "1"),
    "verify": ("verify", "BUNDLE"),
}


def test_commands_without_a_search_run_without_ray_and_optuna(tmp_path: Path, cache: Path) -> None:
    """One process runs them one after another; the help, which is the first, not even torch."""
    (tmp_path / "RECIPE").write_text("tokens: {method: topk, keep_rate: 0.5, prune_layers: [3]}\n")
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, filter="data")
    paths = {"CACHE": str(cache), "BUNDLE": "recorded/bundle"}
    commands = {
        name: [paths.get(a, a) for a in arguments] for name, arguments in LIGHT_COMMANDS.items()
    }
    script = (
        "import json, sys\n"
        "sys.modules.update(ray=None, optuna=None)  # their import fails\n"
        "from vitpareto import cli\n"
        "found = {}\n"
        f"for name, arguments in {commands!r}.items():\n"
        "    sys.argv = ['vitpareto', *arguments]\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as end:\n"
        "        found[name] = [end.code or 0, 'torch' in sys.modules]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # more threads than cores wait for each other
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        name: [0, name != "help"] for name in commands
    }, done.stderr


def test_an_unknown_study_is_refused(command: Run, tmp_path: Path) -> None:
    """By every command that takes one."""
    for name in ("front", "trials", "report", "sync"):
        command(name, "nosuch", "--store", tmp_path).is_refused(Code.NOT_FOUND)
