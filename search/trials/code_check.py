"""Refuse nodes and worker processes that run other code than the driver."""

from __future__ import annotations

import os
import socket

from vitpareto.methods import Code
from vitpareto.search.code_identity import code_fingerprint, describe_code
from vitpareto.search.errors import UserError

#: fingerprint of this process's code when it was imported: its files may change while it runs
CODE = code_fingerprint()


def check_own_code(expected: str) -> None:
    """Raise UserError if this process runs other code than the driver. "" is not compared."""
    found, folder = describe_code()
    if expected and found != expected:
        raise UserError(
            f"worker {os.getpid()} on {socket.gethostname()} runs other code than the driver: "
            f"{folder} with fingerprint {found or 'none'}, the driver's is {expected}. Install the "
            "same vitpareto on every node",
            Code.MISMATCH,
            expected=expected,
            got=found,
            folder=folder,
        )
