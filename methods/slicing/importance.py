"""Importance scores of every head, channel and hidden unit of a model, for structural pruning.

A unit is what slicing can remove: a head, a q/k channel or a v channel of a head, a hidden channel
of an MLP, or a channel of the embedding. Gradients and magnitudes are summed over a unit's weights
by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.slicing.sliced_model import BlockKept, Kept, Widths, model_widths
from vitpareto.methods.slicing.widths import (
    EMBEDDED,
    INTO_HIDDEN,
    attention_widths,
    embedding_norms,
)

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BlockScores:
    """One score per unit, float64 on the CPU: heads [H], qk [H, qk], v [H, v], mlp [M]."""

    heads: Tensor
    qk: Tensor
    v: Tensor
    mlp: Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """One score per unit of the model: embedding [E], and those of each block."""

    embedding: Tensor
    blocks: tuple[BlockScores, ...]

    def parts(self) -> list[Tensor]:
        """All tensors, that of the embedding first."""
        return [self.embedding, *(t for b in self.blocks for t in (b.heads, b.qk, b.v, b.mlp))]

    @classmethod
    def of(cls, parts: list[Tensor]) -> Scores:
        """The inverse of `parts`."""
        blocks = [BlockScores(*parts[i : i + 4]) for i in range(1, len(parts), 4)]
        return cls(parts[0], tuple(blocks))


def importances(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], objective: Objective
) -> Scores:
    """NViT's importance of every unit S: `(sum over s in S of g_s w_s)^2`, summed over batches
    (arXiv:2110.04869, section 3.2). That of an embedding channel is divided by the number of
    tensors that contain it.

    Args:
        model: in eval mode during the call; its gradients stay as they were.
        batches: images [B, 3, H, W] and labels [B].
        objective: the scalar loss of (model, images, labels), whose gradient is g.

    Raises:
        BadInput: if an importance is not finite, or there is no batch.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: list[Tensor] | None = None
    training = model.training
    model.eval()
    try:
        for index, (images, labels) in enumerate(batches):
            with torch.enable_grad():
                loss = objective(model, images, labels)
                grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            found = {
                name: g.detach() * p.detach()
                for (name, p), g in zip(named.items(), grads, strict=True)
                if g is not None
            }
            units, tied = _by_unit(model, found)
            parts = [part.square() for part in units.parts()]
            parts[0] = parts[0] / tied
            if not all(part.isfinite().all() for part in parts):
                raise BadInput(
                    f"importances must be finite (got loss {loss.item()} for batch {index})",
                    Code.OUT_OF_RANGE,
                    name="batches",
                    batch=index,
                    loss=loss.item(),
                )
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    finally:
        model.train(training)
    if total is None:
        raise BadInput(
            "batches must contain at least one batch of images and labels (got none)",
            Code.EMPTY,
            name="batches",
        )
    return Scores.of(total)


def magnitudes(model: nn.Module) -> Scores:
    """The sum of squared weights of every unit; for an embedding channel the mean over tensors."""
    units, tied = _by_unit(model, {n: p.detach().square() for n, p in model.named_parameters()})
    parts = units.parts()
    return Scores.of([parts[0] / tied, *parts[1:]])


def top(scores: Scores, widths: Widths) -> Kept:
    """The units with the highest scores that stay at these widths, in their order.

    All heads of a block keep equally many q/k and v channels, each head its own best.
    """
    blocks = []
    for own, target in zip(scores.blocks, widths.blocks, strict=True):
        heads = _best(own.heads, target.heads)
        blocks.append(
            BlockKept(
                heads,
                _best(own.qk[heads], target.qk),
                _best(own.v[heads], target.v),
                _best(own.mlp, target.mlp),
            )
        )
    return Kept(_best(scores.embedding, widths.embedding), tuple(blocks))


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores along the last dimension, increasing; ties by index."""
    ranked = scores.argsort(dim=-1, descending=True, stable=True)
    return ranked[..., :count].sort(dim=-1).values


def _by_unit(model: nn.Module, found: Mapping[str, Tensor]) -> tuple[Scores, int]:
    """(sums over the weights of each unit, number of tensors that contain an embedding channel).

    found: a tensor of values per parameter name; a missing parameter counts 0.
    """
    vit, widths = cast(VisionTransformer, model), model_widths(model)
    embedding = _Embedding(widths.embedding, found)
    for name in EMBEDDED:
        embedding.add(name, -1)
    embedding.add("patch_embed.proj.weight", 0)
    embedding.add("patch_embed.proj.bias", 0)
    for name, norm in embedding_norms(vit).items():
        for key, _ in norm.named_parameters():
            embedding.add(f"{name}.{key}", 0)
    for name in ("head", "head_dist"):
        embedding.add(f"{name}.weight", -1)
    blocks = []
    pairs = zip(cast("Iterable[Block]", vit.blocks), widths.blocks, strict=True)
    for index, (block, own) in enumerate(pairs):
        at = f"blocks.{index}."
        heads, qk, v = attention_widths(block.attn)
        wide = heads * qk
        rows = _rows(found, at + "attn.qkv", heads * (2 * qk + v))
        q_k = (rows[:wide] + rows[wide : 2 * wide]).view(heads, qk)
        out = rows[2 * wide :] + _columns(found, at + "attn.proj", heads * v)
        if cast(Attention, block.attn).gate is not None:
            out = out + _rows(found, at + "attn.gate", heads * v)
        out = out.view(heads, v)
        hidden = _columns(found, at + "mlp.fc2", own.mlp)
        into = INTO_HIDDEN.get(type(block.mlp), ())
        for name in into:
            hidden = hidden + _rows(found, f"{at}mlp.{name}", own.mlp)
        blocks.append(BlockScores(q_k.sum(dim=1) + out.sum(dim=1), q_k, out, hidden))
        for name in ("attn.qkv", "attn.gate", *(f"mlp.{name}" for name in into)):
            embedding.add(f"{at}{name}.weight", -1)
        for name in ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
            embedding.add(at + name, 0)
        embedding.add(at + "ls1.gamma", 0)
        embedding.add(at + "ls2.gamma", 0)
    return Scores(embedding.sum, tuple(blocks)), max(1, embedding.tensors)


class _Embedding:
    """Sums over the tensors that contain the embedding, per channel."""

    def __init__(self, width: int, found: Mapping[str, Tensor]):
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.tensors, self.found = 0, found

    def add(self, name: str, dim: int) -> None:
        """Add the parameter `name`, if it exists, whose dimension `dim` is the embedding."""
        value = self.found.get(name)
        if value is None or value.shape[dim] != len(self.sum):
            return  # attention pooling has a width of its own
        others = [d for d in range(value.dim()) if d != dim % value.dim()]
        self.sum += _double(value.sum(dim=others) if others else value)
        self.tensors += 1


def _double(value: Tensor) -> Tensor:
    return value.to("cpu", torch.float64)


def _rows(found: Mapping[str, Any], name: str, count: int) -> Tensor:
    """Sums per output of a linear layer, bias included: [count]."""
    total = torch.zeros(count, dtype=torch.float64)
    for key, value in ((k, found.get(f"{name}.{k}")) for k in ("weight", "bias")):
        if value is not None:
            total += _double(value.sum(dim=1) if key == "weight" else value)
    return total


def _columns(found: Mapping[str, Any], name: str, count: int) -> Tensor:
    """Sums per input of a linear layer: [count]."""
    value = found.get(f"{name}.weight")
    return torch.zeros(count, dtype=torch.float64) if value is None else _double(value.sum(dim=0))
