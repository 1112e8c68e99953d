"""Messages of the tracker for the user, with the event that each one reports."""

from __future__ import annotations

import enum


class Event(enum.Enum):
    """What a notice reports."""

    UNAVAILABLE = "the server stopped answering"
    AVAILABLE = "the server answers again"
    SENDING = "the search waits for the server at its end"
    NOT_SENT = "entries are left for `vitpareto sync`"
    REFUSED = "the server rejected runs"


class Notice(str):
    """A message with the event it reports."""

    event: Event

    def __new__(cls, event: Event, text: str) -> Notice:
        notice = super().__new__(cls, text)
        notice.event = event
        return notice
