"""Models that are really smaller: built empty in any widths, or cut out of a model's weights.

A sliced model is a timm VisionTransformer whose blocks are `SlicedBlock`s: each has its own number
of heads, q/k width, v width and MLP hidden width; the embedding is one for the model. Dimensions
can be read back from a state dict (`widths_of`). Used by NViT and ReViT.
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

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.sliced_block import SlicedAttention, SlicedBlock
from vitpareto.methods.slicing.widths import (
    EMBEDDED,
    INTO_HIDDEN,
    BlockWidths,
    Widths,
    attention_widths,
    embedding_norms,
    fixed,
    model_widths,
    refuse,
    unshapable,
    widths_of,
)

__all__ = [
    "BlockKept", "BlockWidths", "Kept", "SlicedAttention", "SlicedBlock", "Widths", "fixed",
    "model_widths", "slice_model", "sliced_model", "widths_of",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class BlockKept:
    """What stays of a block, as indices in it: heads [h]; of each kept head its q/k channels
    [h, qk] and its v channels [h, v]; hidden channels [mlp].
    """

    heads: Tensor
    qk: Tensor
    v: Tensor
    mlp: Tensor

    @property
    def widths(self) -> BlockWidths:
        return BlockWidths(len(self.heads), self.qk.shape[1], self.v.shape[1], len(self.mlp))


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a model: embedding channels [E] and, for each block, its `BlockKept`."""

    embedding: Tensor
    blocks: tuple[BlockKept, ...]

    @property
    def widths(self) -> Widths:
        return Widths(len(self.embedding), tuple(block.widths for block in self.blocks))


def sliced_model(model: nn.Module, widths: Widths) -> nn.Module:
    """A copy of `model` in these widths, smaller or larger. What changes shape is uninitialised
    and everything else as it was: load a state dict, or initialise.

    Raises UnsupportedModel where a part of the model has no such width.
    """
    before = model_widths(model)
    if len(widths.blocks) != len(before.blocks):
        raise BadInput(
            f"the widths are of {len(widths.blocks)} blocks, the model has {len(before.blocks)}"
        )
    refuse(model, before, widths, unshapable(model))
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
    """Gives a norm or a layer scale another width."""
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
    """Makes timm's attention, or a sliced one, a sliced one of these widths."""
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
    """Everything over the embedding outside the blocks' linear layers."""
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
    """A copy of `model` with only what `kept` names: the weights of everything else are gone.

    The logits are those of `model` with the weights of what is not kept zeroed, and where the
    embedding is cut, with its layer norms over the kept channels. A narrower q/k would change the
    scale of the logits from qk^-0.5 to qk'^-0.5: sqrt(qk'/qk) is folded into q. Raises
    UnsupportedModel where a cut would not be exact in this model.
    """
    before, after = model_widths(model), kept.widths
    small = sliced_model(model, after)
    refuse(model, before, after, fixed(model))
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
