"""The error for input that the caller can correct, with a code and attributes for programs.

Messages are for people and may change; tests and callers read `code` and `details`.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from typing import Any, Self, TypeVar


class Code(enum.StrEnum):
    """What kind of rule the input breaks."""

    UNKNOWN_NAME = "unknown-name"  # a name that is not registered or declared
    WRONG_TYPE = "wrong-type"  # a value of another type or form
    OUT_OF_RANGE = "out-of-range"  # a number or choice outside what is accepted
    MISSING = "missing"  # something required was not given
    CONFLICT = "conflict"  # two inputs that exclude each other
    DUPLICATE = "duplicate"  # a name given twice
    NOT_FOUND = "not-found"  # a file, study, trial or job that does not exist
    EXISTS = "exists"  # an output that must not exist yet
    UNREADABLE = "unreadable"  # a file that exists and cannot be read or parsed
    UNWRITABLE = "unwritable"  # an output that cannot be written
    UNSUPPORTED = "unsupported"  # a model, device or combination that cannot be handled
    MISMATCH = "mismatch"  # two things that must be equal differ
    UNAVAILABLE = "unavailable"  # a service, device or package that does not answer
    BUSY = "busy"  # held by another process
    SECRET = "secret"  # a credential where it would be stored in clear text
    EMPTY = "empty"  # nothing is left to do or to choose from


E = TypeVar("E", bound="BadInput")


class BadInput(ValueError):
    """Input that the caller can correct.

    Args:
        message: what must be true, what came, and the nearest match or the fix.
        code: the kind of rule that is broken.
        details: what the message names, for example `name="r", got=-1`. Values must pickle.
    """

    def __init__(self, message: str, code: Code, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.details = details

    @classmethod
    def unknown(
        cls,
        problem: str,
        word: object,
        known: Iterable[str],
        *,
        code: Code = Code.UNKNOWN_NAME,
        **details: Any,
    ) -> Self:
        """The error for a word that is none of the known ones.

        The message is `problem` and the closest known word, or all of them; `details` hold it as
        `closest`.
        """
        known = tuple(known)
        match = closest(word, known)
        return cls(f"{problem}{nearest(word, known)}", code, closest=match, **details)

    def __reduce__(self) -> tuple[Any, ...]:
        # keyword arguments are lost by the default, and these errors cross process boundaries
        return _rebuilt, (type(self), str(self), self.code, self.details)


def _rebuilt(kind: type[E], message: str, code: Code, details: dict[str, Any]) -> E:
    return kind(message, code, **details)


def closest(word: object, known: Iterable[str]) -> str | None:
    """The known word that is most similar to `word`; None if none is similar."""
    # YAML keys may be numbers
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.6)
    return close[0] if close else None


def suggestion(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """`": did you mean 'x'?"` for the closest known word; `otherwise` if none is similar."""
    match = closest(word, known)
    return otherwise if match is None else f": did you mean {match!r}?"


def nearest(word: object, known: Iterable[str]) -> str:
    """As `suggestion`, and all known words if none is similar."""
    known = sorted(known)
    listed = f"; known: {', '.join(known)}" if known else "; there are none"
    return suggestion(word, known, listed)
