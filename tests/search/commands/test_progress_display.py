"""Progress is bars on a terminal and few lines in a log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vitpareto.search.commands import progress_display
from vitpareto.search.commands.progress_display import ProgressDisplay, SearchProgress


def test_a_log_gets_a_line_every_ten_seconds_and_the_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: now[0])
    with ProgressDisplay(terminal=False) as display:
        count = display.counter("decoding images")
        for done in range(1, 101):
            count(done, 100)
            now[0] += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        f"decoding images: {done}/100" for done in (1, 21, 41, 61, 81, 100)
    ]


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the captured stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with ProgressDisplay(terminal=True) as display:
        count = display.counter("decoding images")
        count(1, 4)
        count(4, 4)
        count(1, 2)  # another split: a bar of its own
    text = capsys.readouterr().err
    assert "decoding images: 4/4" in text and "decoding images: 1/2" in text


def test_a_search_shows_how_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    state: Any = SimpleNamespace(
        done=3, requested=10, raced_out=1, running=2, failed=0, front=[0, 1], hypervolume=0.51239,
        ended="",
    )  # fmt: skip
    with ProgressDisplay(terminal=False) as display:
        search = SearchProgress(display)
        search.on_result(None, state)
        for _ in range(2):
            search.on_result(SimpleNamespace(), state)  # type: ignore[arg-type]
        text = search.text(state)
    assert text.startswith(
        "3/10 done, 1 of them stopped early, 2 running, 0 failed; front 2 trials, "
        "hypervolume 0.5124; about 0 min "
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert search.results == 2
