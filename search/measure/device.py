"""The torch device that a name such as `auto` means in this process, and a device's own name."""

from __future__ import annotations

import torch

from vitpareto.methods.engine.bad_input import Code
from vitpareto.search.errors import UserError


def resolve_device(device: str) -> str:
    """`auto` becomes the first GPU, or the CPU without one; other names are returned.

    Raises UserError if CUDA, or that CUDA device, does not exist here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (torch.device(device).index or 0) >= count:
            raise UserError(
                f"device {device!r} does not exist; CUDA devices that torch sees: {count}",
                Code.UNAVAILABLE,
                key="device",
                got=device,
                devices=count,
            )
    return device


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or "cpu"; "cuda" where this process sees no GPU."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type
