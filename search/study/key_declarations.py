"""How a job key is declared: its kind, default and help, and what it decides.

Standard library only, so that the command can declare its options from job keys at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from vitpareto.search.study.key_kinds import Kind


class Identity(enum.Enum):
    """When a study's identity holds a key: a study does not continue with another value of it."""

    NEVER = "never"  # no number depends on it
    ALWAYS = "always"
    BY_CONTENT = "by content"  # what it names, as a fingerprint (`job_check`)
    IF_TRAINED = "if trained"  # in studies with a method that is trained
    IF_RACED = "if raced"  # in studies that stop dominated trials early
    IF_CHANGED = "if changed"  # where it is not the default, which older studies had


@dataclass(frozen=True)
class Key:
    """One job key.

    Attributes:
        shown_default: the default in help texts and in the table.
        identity: when a study's identity holds the key.
        measured: whether `measure` takes it: it decides how one recipe is measured.
        path_after: what precedes a path of this machine in the value, "" or "local-dir:"; None if
            the value is no path that a package holds.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    shown_default: str
    identity: Identity = Identity.NEVER
    measured: bool = False
    path_after: str | None = None

    @property
    def option(self) -> str:
        """The command-line option, for example --max-gmacs."""
        return f"--{self.name.replace('_', '-')}"


def _shown(default: Any) -> str:
    if default is None or default == {}:
        return "none"
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def key(kind: Kind, default: Any, help: str, shown: str = "", **more: Any) -> Any:
    """Declare a field of `JobKeys`. A mutable default is copied for every job.

    Args:
        more: further attributes of `Key`.
    """
    shown = shown or _shown(default)
    about = {"kind": kind, "default": default, "help": help, "shown_default": shown, **more}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)
