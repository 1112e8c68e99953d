"""The errors a user can mend: bad input, told in one message and shown without a traceback."""

from __future__ import annotations

from vitpareto.methods import BadInput


class UserError(BadInput):
    """Bad input: one message, no traceback."""
