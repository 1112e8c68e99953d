"""A study's images as the node that this process runs on has them. Does not import ray."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.data.datasets import Data
from vitpareto.search.data.decoded import Split, is_complete
from vitpareto.search.errors import UserError


def local_split(split: Split, data: Data) -> Split:
    """The split as decoded on this node; decoded now if it does not exist here.

    It lies in the folder that VITPARETO_CACHE names on this node, else where the driver has it,
    which this node may see. Raises UserError if this node's images differ from the driver's.
    """
    cache = os.environ.get("VITPARETO_CACHE")
    if cache:
        split = replace(split, folder=Path(cache).absolute() / "decoded" / split.folder.name)
    if is_complete(split):
        return split
    local = data.at(Path(cache) if cache else None).split(split.name)
    if local.fingerprint != split.fingerprint:
        unreadable = sorted(set(local.corrupt) - set(split.corrupt))[:3]
        files = f"; unreadable on this node: {', '.join(unreadable)}" if unreadable else ""
        host = socket.gethostname()
        raise UserError(
            f"images of {data.spec} ({split.name}) on {host} must equal the driver's, with "
            f"fingerprint {split.fingerprint[:12]} (got {len(local)} images with fingerprint "
            f"{local.fingerprint[:12]}){files}",
            Code.MISMATCH,
            data=data.spec,
            split=split.name,
            host=host,
            got=local.fingerprint,
            accepted=split.fingerprint,
            unreadable=unreadable,
        )
    return local
