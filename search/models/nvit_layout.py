"""NViT's published layout: separate q, k and v, a token mask, and dimensions beside the weights.

Converted to a sliced model's state dict: one `qkv` per block, and `attn.widths`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitpareto.search.errors import Code, UserError
from vitpareto.search.models.weight_files import WeightsFile

#: NViT's attention divides by the root of DeiT's head width, however narrow q and k are
NVIT_SCALE = 64**-0.5


@dataclass(frozen=True)
class AttentionWidths:
    """The dimensions of a block's attention, per head except `heads`."""

    heads: int
    qk: int
    v: int

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each weight."""
        return {"Q": self.heads * self.qk, "K": self.heads * self.qk, "V": self.heads * self.v}


def convert_nvit(file: WeightsFile, timm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the sliced model. `timm`: the file's tensors that are named as timm's.

    Raises UserError if keys are missing, if dimensions do not match, or if a token mask weighs
    tokens differently.
    """
    state = dict(timm)
    blocks = file.numbers(r"blocks\.(\d+)\.")
    for block, widths in zip(blocks, _dimensions(file, len(blocks)), strict=True):
        state.update(_attention(file, f"blocks.{block}.attn.", widths))
    file.require("NViT's", ["patch_embed.proj.weight"])
    state["patch_embed.proj.weight"] = _patch_embedding(file)
    return state


def _attention(file: WeightsFile, prefix: str, widths: AttentionWidths) -> dict[str, Tensor]:
    """The weights of one block's attention under `prefix`."""
    ends = ("weight", "bias")
    separate = [f"{prefix}qkv.{x}.{end}" for x in "QKV" for end in ends]
    file.require("NViT's", separate + [f"{prefix}proj.proj.{end}" for end in ends])
    _check_attention(file, prefix, widths)
    # attention here divides by the root of the actual width: fold the difference into q
    factors = {"Q": NVIT_SCALE * widths.qk**0.5, "K": 1.0, "V": 1.0}
    state = {f"{prefix}widths": torch.tensor([widths.heads, widths.qk, widths.v])}
    for end in ends:
        scaled = [file.state[f"{prefix}qkv.{x}.{end}"] * factor for x, factor in factors.items()]
        state[f"{prefix}qkv.{end}"] = torch.cat(scaled)
        state[f"{prefix}proj.{end}"] = file.state[f"{prefix}proj.proj.{end}"]
    return state


def _check_attention(file: WeightsFile, prefix: str, widths: AttentionWidths) -> None:
    mask = file.state.get(f"{prefix}qkv.token_mask", torch.ones(1))
    if not bool((mask == 1).all()):
        raise UserError(
            f"weights file {file.path}: {prefix}qkv.token_mask must be 1 for every token (got "
            f"{mask.min():.3g} to {mask.max():.3g}): weights of a block cannot express a weight "
            "per token",
            Code.UNSUPPORTED,
            path=str(file.path),
            key=f"{prefix}qkv.token_mask",
        )
    for x, rows in widths.rows.items():
        shape = tuple(file.state[f"{prefix}qkv.{x}.weight"].shape)
        if len(shape) != 2 or shape[0] != rows:
            hint = "; the file is NViT's before slicing" if len(shape) == 3 else ""
            raise UserError(
                f"weights file {file.path}: {prefix}qkv.{x}.weight must have {rows} rows according "
                f"to dim ({widths.heads} heads, q and k {widths.qk} and v {widths.v} wide; got "
                f"shape {list(shape)}){hint}",
                Code.MISMATCH,
                path=str(file.path),
                key=f"{prefix}qkv.{x}.weight",
                got=shape,
                rows=rows,
                unsliced=len(shape) == 3,
            )


def _dimensions(file: WeightsFile, depth: int) -> list[AttentionWidths]:
    """Each block's dimensions: the weights alone do not tell how many heads share them."""
    dim = file.beside.get("dim")
    keys = ("head", "QK", "V")
    lists = [dim.get(key) if isinstance(dim, Mapping) else None for key in keys]
    for key, values in zip(keys, lists, strict=True):
        listed = isinstance(values, (list, tuple)) and len(values) == depth
        if not listed or not all(isinstance(n, int) and n >= 1 for n in values or ()):
            raise UserError(
                f"weights file {file.path} has NViT's layout: dim.{key} beside the weights must be "
                f"a list of {depth} positive integers (got {values!r})",
                Code.WRONG_TYPE if dim is not None else Code.MISSING,
                path=str(file.path),
                key=f"dim.{key}",
                got=values,
            )
    columns = zip(*(list(values or ()) for values in lists), strict=True)
    return [AttentionWidths(*column) for column in columns]


def _patch_embedding(file: WeightsFile) -> Tensor:
    """[E, p * p * 3, 1, 1] over pixels row by row, channels last -> a convolution [E, 3, p, p]."""
    weight = file.state["patch_embed.proj.weight"]
    side = math.isqrt(weight.shape[1] // 3)
    if weight.dim() != 4 or weight.shape[1:] != (3 * side * side, 1, 1):
        raise UserError(
            f"weights file {file.path} has NViT's layout: patch_embed.proj.weight must have shape "
            f"[E, 3 * side * side, 1, 1] (got {list(weight.shape)})",
            Code.MISMATCH,
            path=str(file.path),
            key="patch_embed.proj.weight",
            got=tuple(weight.shape),
        )
    return weight.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
