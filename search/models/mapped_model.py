"""A dense model that the workers of a node share: its weights are one memory-mapped file."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import nn

from vitpareto.search.files.atomic import replacing


@dataclass(frozen=True)
class MappedModel:
    """A model as it is sent to workers: a pickled skeleton without weights, and the weights' file.

    The skeleton comes from `save` in the same study, never from a user.
    """

    skeleton: bytes
    weights: Path

    @classmethod
    def save(cls, model: nn.Module, path: Path) -> MappedModel:
        """Write the weights to `path` (safetensors) and keep the skeleton."""
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        with replacing(path) as partial:
            safetensors.torch.save_file(state, partial)
            partial.chmod(0o644)  # other users read a study too
        skeleton = copy.deepcopy(model)
        for module in skeleton.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                meta = torch.empty_like(parameter, device="meta")
                setattr(module, name, nn.Parameter(meta, requires_grad=parameter.requires_grad))
        return cls(pickle.dumps(skeleton), path)

    def load(self, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
        """The model in eval mode. On a CPU in float32 its weights are pages of the mapped file."""
        model = cast(nn.Module, pickle.loads(self.skeleton))
        model.load_state_dict(safetensors.torch.load_file(self.weights), assign=True)
        return model.to(device=device, dtype=dtype).eval()
