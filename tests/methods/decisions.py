"""Every choice a forward makes, written down in one run and imposed on another.

A choice is an operation that takes real numbers and gives whole ones or truths: a topk, a sort, a
best match, a comparison, a count rounded down. Nothing here knows a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


def _tensors(of: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, however nested."""
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, (tuple, list)):
        for part in of:
            yield from _tensors(part)
    elif isinstance(of, dict):
        yield from _tensors(list(of.values()))


class Decisions(TorchFunctionMode):
    """Records the choices made inside it; given `imposed`, those of another run, makes these
    instead, in order. What is selected with a choice, topk's values beside its indices, follows it.
    """

    def __init__(self, imposed: Decisions | None = None):
        super().__init__()
        self.imposed = None if imposed is None else list(imposed.made)
        self.made: list[tuple[str, list[Tensor]]] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = [t for t in _tensors([args, kwargs]) if t.is_floating_point()]
        chosen = [t for t in _tensors(out) if not t.is_floating_point()]
        if not sources or not chosen:
            return out
        name = getattr(func, "__name__", str(func))
        if self.imposed is not None:
            assert len(self.made) < len(self.imposed), f"{name} is a choice too many"
            expected, chosen = self.imposed[len(self.made)]
            assert name == expected, f"{name} where the other run has {expected}"
            out = self._follow(out, sources[0], chosen)
        self.made.append((name, [t.clone() for t in chosen]))
        return out

    @staticmethod
    def _follow(out: Any, source: Tensor, chosen: list[Tensor]) -> Any:
        if isinstance(out, Tensor):
            return chosen[0].clone()
        values, found = out  # (values, indices) over the last dimension: topk, sort, max, min
        (index,) = chosen
        assert index.shape == found.shape == values.shape
        across = index if index.dim() == source.dim() else index[..., None]
        return type(out)((source.gather(-1, across).view(index.shape), index.clone()))
