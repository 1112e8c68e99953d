"""The nearest known word, as a value and as the end of a message."""

from __future__ import annotations

from vitpareto.methods.engine.bad_input import closest, nearest, suggestion

KNOWN = ("tome", "topk", "tnt")


def test_the_closest_word_is_a_value_or_none() -> None:
    assert closest("tomee", KNOWN) == "tome"
    assert closest("dynamicvit", KNOWN) is None
    assert closest("tome", ()) is None
    assert closest(160, ("size", "1600")) == "1600"  # YAML keys may be numbers


def test_a_message_ends_with_the_closest_word_or_with_something_else() -> None:
    assert "'tome'" in suggestion("tomee", KNOWN)
    assert suggestion("dynamicvit", KNOWN) == ""
    assert suggestion("dynamicvit", KNOWN, ": must be x") == ": must be x"
    assert nearest("tomee", KNOWN) == suggestion("tomee", KNOWN)
    assert all(name in nearest("dynamicvit", KNOWN) for name in KNOWN)
