"""Parameters and peak memory of a model.

Off CUDA, live tensors are tracked through two private parts of torch (`_python_dispatch` and a
storage's `_cdata`); no other module of this package uses them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def count_parameters(model: nn.Module) -> int:
    """Number of elements in the model's parameters."""
    return sum(p.numel() for p in model.parameters())


def peak_mb(model: nn.Module, images: Tensor) -> float:
    """Peak memory of one forward over `images` [B, 3, H, W], weights included, in MB (1e6 bytes).

    On CUDA, as reported by the allocator. Elsewhere, the tensors that are alive between operations;
    the workspace of an operation is not included.
    """
    tensors = (*model.parameters(), *model.buffers())
    weights = sum(t.numel() * t.element_size() for t in tensors)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        with torch.inference_mode():
            model(images)
        peak = torch.cuda.max_memory_allocated(images.device) - before
    else:
        with torch.inference_mode(), _LiveBytes((*tensors, images)) as live:
            model(images)
        peak = live.peak
    return (weights + peak) / 1e6


class _LiveBytes(TorchDispatchMode):
    """Bytes of live tensors that operations inside this mode allocated, and their peak.

    existing: tensors allocated before, whose views are not counted as new memory.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in existing}

    def _on_free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._on_free, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out
