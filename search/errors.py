"""The error of this package for input that the user can correct.

The command line prints its message without a traceback. May import `vitpareto.methods` alone.
"""

from __future__ import annotations

from vitpareto.methods.engine.bad_input import BadInput, Code, closest, nearest, suggestion

__all__ = ["BadInput", "Code", "UserError", "closest", "nearest", "suggestion"]


class UserError(BadInput):
    """Input that the user can correct: a job, a command line, a file or the environment."""
