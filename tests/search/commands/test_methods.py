"""`vitpareto methods` lists what is registered."""

from __future__ import annotations

from tests.command_line import Run
from vitpareto import methods


def test_methods_lists_every_registered_method(command: Run) -> None:
    text = command("methods").out
    assert [row["name"] for row in command("methods", "--json").rows] == list(methods.names())
    assert all(f"{name}: " in text for name in methods.names())
    assert "arxiv.org/abs/2210.09461" in command("methods", "tome").out
