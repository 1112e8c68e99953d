"""Sliced models: built uninitialised in any widths, or cut out of a model's weights.

A sliced model is a timm VisionTransformer of `SlicedBlock`s, each with its own number of heads, q/k
width, v width and MLP hidden width; all blocks share the embedding. The widths can be read from a
state dict (`widths_of`). Used by NViT and ReViT.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import skip_init

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.sliced_block import SlicedAttention, SlicedBlock
from vitpareto.methods.slicing.widths import (
    EMBEDDED,
    INTO_HIDDEN,
    BlockWidths,
    Widths,
    attention_widths,
    check_changes,
    embedding_norms,
    fixed,
    model_widths,
    unshapable,
    widths_of,
)

__all__ = [
    "BlockKept", "BlockWidths", "Kept", "SlicedAttention", "SlicedBlock", "Widths", "fixed",
    "model_widths", "slice_model", "sliced_model", "widths_of",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class BlockKept:
    """What stays of a block, as indices.

    Attributes:
        heads: kept heads [h].
        qk, v: kept q/k channels [h, qk] and v channels [h, v] of each kept head.
        mlp: kept hidden channels [mlp].
    """

    heads: Tensor
    qk: Tensor
    v: Tensor
    mlp: Tensor

    @property
    def widths(self) -> BlockWidths:
        """The widths of the block with these units only."""
        return BlockWidths(len(self.heads), self.qk.shape[1], self.v.shape[1], len(self.mlp))


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a model: the indices of embedding channels [E], and a `BlockKept` per block."""

    embedding: Tensor
    blocks: tuple[BlockKept, ...]

    @property
    def widths(self) -> Widths:
        """The widths of the model with these units only."""
        return Widths(len(self.embedding), tuple(block.widths for block in self.blocks))


def sliced_model(model: nn.Module, widths: Widths) -> nn.Module:
    """A copy of `model` with these widths, smaller or larger.

    Parameters that change shape are uninitialised: load a state dict, or initialise them. Raises
    UnsupportedModel if a part of the model cannot have such a width.
    """
    before = model_widths(model)
    if len(widths.blocks) != len(before.blocks):
        raise BadInput(
            f"widths must have one entry per block, {len(before.blocks)} "
            f"(got {len(widths.blocks)})",
            Code.MISMATCH,
            name="widths",
            got=len(widths.blocks),
            expected=len(before.blocks),
        )
    check_changes(model, before, widths, unshapable(model))
    made = copy.deepcopy(model)
    vit = cast(VisionTransformer, made)
    if widths.embedding != before.embedding:
        _set_embedding(vit, widths.embedding)
    for block, own in zip(cast("Sequence[Block]", vit.blocks), widths.blocks, strict=True):
        _set_attention(cast(Attention, block.attn), widths.embedding, own)
        into = INTO_HIDDEN.get(type(block.mlp), ())
        for name in into:
            _set_linear(block.mlp, name, widths.embedding, own.mlp)
        if into:
            _set_linear(block.mlp, "fc2", own.mlp, widths.embedding)
            _set_vectors(cast(nn.Module, block.mlp.norm), own.mlp)
        block.__class__ = SlicedBlock
    return made


def _empty(old: Tensor, *shape: int) -> nn.Parameter:
    return nn.Parameter(old.detach().new_empty(shape), requires_grad=old.requires_grad)


def _set_vectors(module: nn.Module, width: int) -> None:
    """Give a norm or a layer scale another width."""
    for name, old in list(module.named_parameters(recurse=False)):
        if len(old) != width:
            setattr(module, name, _empty(old, width))
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (width,)  # type: ignore[assignment]


def _set_linear(parent: nn.Module, name: str, into: int, out: int) -> None:
    old = cast(nn.Linear, getattr(parent, name))
    if (old.in_features, old.out_features) == (into, out):
        return
    like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = skip_init(nn.Linear, into, out, bias=old.bias is not None, **like)
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, key).requires_grad)
    setattr(parent, name, new.train(old.training))


def _set_attention(attn: Attention, embedding: int, own: BlockWidths) -> None:
    """Turn timm's attention, or a sliced one, into a sliced one of these widths."""
    inner = own.heads * own.v
    _set_linear(attn, "qkv", embedding, own.heads * (2 * own.qk + own.v))
    _set_linear(attn, "proj", inner, embedding)
    if attn.gate is not None:
        _set_linear(attn, "gate", embedding, inner)
    _set_vectors(attn.q_norm, own.qk)
    _set_vectors(attn.k_norm, own.qk)
    _set_vectors(attn.norm, inner)
    attn.__class__ = SlicedAttention
    made = cast(SlicedAttention, attn)
    made.num_heads, made.head_dim, made.v_dim = own.heads, own.qk, own.v
    made.attn_dim, made.scale = inner, own.qk**-0.5
    widths = torch.tensor([own.heads, own.qk, own.v], device=attn.qkv.weight.device)
    made.register_buffer("widths", widths)


def _set_embedding(vit: VisionTransformer, width: int) -> None:
    """Set the width of everything over the embedding, except the blocks' linear layers."""
    vit.embed_dim = vit.num_features = vit.head_hidden_size = width
    for info in vit.feature_info:
        info["num_chs"] = width
    for name in EMBEDDED:
        old = getattr(vit, name, None)
        if old is not None:
            setattr(vit, name, _empty(old, *old.shape[:-1], width))
    stem = cast(nn.Conv2d, vit.patch_embed.proj)
    stem.out_channels = width
    stem.weight = _empty(stem.weight, width, *stem.weight.shape[1:])
    if stem.bias is not None:
        stem.bias = _empty(stem.bias, width)
    for norm in embedding_norms(vit).values():
        _set_vectors(norm, width)
    for block in cast("Sequence[Block]", vit.blocks):
        _set_vectors(block.ls1, width)
        _set_vectors(block.ls2, width)
    for name in ("head", "head_dist"):
        head = getattr(vit, name, None)
        if isinstance(head, nn.Linear):
            _set_linear(vit, name, width, head.out_features)


def slice_model(model: nn.Module, kept: Kept) -> nn.Module:
    """A copy of `model` with only the units of `kept`.

    Its logits are those of `model` with all other units' weights set to zero, and if the embedding
    is cut, with layer norms over the kept channels. A narrower q/k changes the scale of the
    attention logits from qk^-0.5 to qk'^-0.5; the factor sqrt(qk'/qk) is folded into q. Raises
    UnsupportedModel if a cut would not be exact in this model.
    """
    before, after = model_widths(model), kept.widths
    small = sliced_model(model, after)
    check_changes(model, before, after, fixed(model))
    source, target = cast(VisionTransformer, model), cast(VisionTransformer, small)
    with torch.no_grad():
        e = kept.embedding.to(next(source.blocks.parameters()).device)
        if after.embedding != before.embedding:
            _cut_embedding(source, target, e)
        pairs = zip(source.blocks, target.blocks, kept.blocks, strict=True)
        for old, new, own in cast("Any", pairs):
            _cut_attention(old.attn, new.attn, e, own)
            hidden = own.mlp.to(e.device)
            for name in INTO_HIDDEN.get(type(old.mlp), ()):
                _cut_linear(getattr(old.mlp, name), getattr(new.mlp, name), hidden, e)
            if type(old.mlp) in INTO_HIDDEN:
                _cut_linear(old.mlp.fc2, new.mlp.fc2, e, hidden)
    return small


def _cut_linear(old: nn.Linear, new: nn.Linear, rows: Tensor, columns: Tensor) -> None:
    new.weight.copy_(old.weight[rows][:, columns])
    if old.bias is not None:
        new.bias.copy_(old.bias[rows])


def _cut_vectors(old: nn.Module, new: nn.Module, index: Tensor) -> None:
    for (_, source), (_, target) in zip(
        old.named_parameters(recurse=False), new.named_parameters(recurse=False), strict=True
    ):
        target.copy_(source[index])


def _cut_attention(old: Attention, new: SlicedAttention, e: Tensor, own: BlockKept) -> None:
    heads, qk, v = attention_widths(old)
    head = own.heads.to(e.device)[:, None]
    q = (head * qk + own.qk.to(e.device)).flatten()
    out = (head * v + own.v.to(e.device)).flatten()
    wide = heads * qk
    _cut_linear(old.qkv, new.qkv, torch.cat([q, q + wide, out + 2 * wide]), e)
    factor = (own.qk.shape[1] / qk) ** 0.5
    if factor != 1:
        new.qkv.weight[: len(q)] *= factor
        if new.qkv.bias is not None:
            new.qkv.bias[: len(q)] *= factor
    _cut_linear(old.proj, new.proj, e, out)
    if old.gate is not None:
        _cut_linear(old.gate, cast(nn.Linear, new.gate), out, e)


def _cut_embedding(source: VisionTransformer, target: VisionTransformer, e: Tensor) -> None:
    for name in EMBEDDED:
        old = getattr(source, name, None)
        if old is not None:
            getattr(target, name).copy_(old[..., e])
    stem, small = cast(nn.Conv2d, source.patch_embed.proj), cast(nn.Conv2d, target.patch_embed.proj)
    small.weight.copy_(stem.weight[e])
    if stem.bias is not None:
        cast(Tensor, small.bias).copy_(stem.bias[e])
    norms = embedding_norms(target)
    for name, old in embedding_norms(source).items():
        _cut_vectors(old, norms[name], e)
    for block, new in cast("Any", zip(source.blocks, target.blocks, strict=True)):
        _cut_vectors(block.ls1, new.ls1, e)
        _cut_vectors(block.ls2, new.ls2, e)
    for name in ("head", "head_dist"):
        head = getattr(source, name, None)
        if isinstance(head, nn.Linear):
            every = torch.arange(head.out_features, device=e.device)
            _cut_linear(head, getattr(target, name), every, e)
