"""State dicts: their name by content, and loading them whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of a state dict's names, dtypes, shapes and bytes, on whatever device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load every parameter and buffer of `model`; BadInput names the first keys at fault."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = [
        f"{k} is {tuple(weights[k].shape)}, the model's {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    said = [
        f"{what}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("wrong shape", shapes))
        if keys
    ]
    if said:
        raise BadInput(f"the weights do not fit the model; {'; '.join(said)}")
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        # equal shapes, and still another model's: a sliced block's widths
        first = str(error).strip().splitlines()[:2][-1].strip()
        raise BadInput(f"the weights do not fit the model; {first}") from None
