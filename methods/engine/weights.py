"""State dicts: their digest, and loading them strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over a state dict's names, dtypes, shapes and bytes, on any device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load every parameter and buffer of `model`. Raises BadInput with the first wrong keys."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    wrong = {
        key: (tuple(weights[key].shape), tuple(value.shape))
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    }
    shapes = [f"{key} {given}, not {expected}" for key, (given, expected) in wrong.items()]
    problems = [
        f"{what}: {', '.join(keys[:4])}{' …' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("wrong shape", shapes))
        if keys
    ]
    if problems:
        raise BadInput(
            f"the weights do not fit the model; {'; '.join(problems)}",
            Code.MISMATCH,
            missing=missing[:4],
            unknown=unknown[:4],
            shapes=dict(list(wrong.items())[:4]),
        )
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        # shapes agree and the widths of a sliced block do not (2 heads of 16, or 4 of 8)
        first = str(error).strip().splitlines()[:2][-1].strip()
        raise BadInput(
            f"the weights do not fit the model; {first}", Code.MISMATCH, reason=first
        ) from None
