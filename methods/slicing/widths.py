"""The widths of a model: what slicing may change, read from a model or back from a state dict.

Also which of them a model's parts allow no other value for, and which cannot be cut exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.layers.attention import Attention
from timm.layers.mlp import Mlp, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.engine.errors import BadInput
from vitpareto.methods.engine.reduced_model import UnsupportedModel, check_supported
from vitpareto.methods.engine.sliced_block import SlicedAttention

#: MLPs whose hidden width can be set: the layers into it; `fc2` leads out
INTO_HIDDEN = {Mlp: ("fc1",), SwiGLU: ("fc1_g", "fc1_x")}


#: what `Widths.from_plain` takes
ACCEPTED = "{embedding: E, blocks: [[heads, qk, v, mlp], …]}, whole numbers from 1"
#: a block's dimensions, in words
PARTS = {"heads": "number of heads", "qk": "q/k width", "v": "v width", "mlp": "MLP hidden width"}
#: parameters over the embedding that hang on the model itself
EMBEDDED = ("cls_token", "dist_token", "reg_token", "pos_embed")


@dataclass(frozen=True)
class BlockWidths:
    """One block: heads, width of q and k and width of v per head, MLP hidden width."""

    heads: int
    qk: int
    v: int
    mlp: int


@dataclass(frozen=True)
class Widths:
    """All that slicing may change: the embedding, one for the model, and each block's widths."""

    embedding: int
    blocks: tuple[BlockWidths, ...]

    def to_plain(self) -> dict[str, Any]:
        """For YAML and JSON: {embedding: 176, blocks: [[heads, qk, v, mlp], …]}."""
        return {
            "embedding": self.embedding,
            "blocks": [[b.heads, b.qk, b.v, b.mlp] for b in self.blocks],
        }

    @classmethod
    def from_plain(cls, data: Any, where: str = "widths") -> Widths:
        """From what `to_plain` gave; BadInput, naming `where`, says what is wrong."""
        if not isinstance(data, Mapping) or set(data) != {"embedding", "blocks"}:
            raise BadInput(f"{where} is {data!r}: accepted is {ACCEPTED}")
        embedding, blocks = data["embedding"], data["blocks"]
        if not _is_width(embedding):
            raise BadInput(
                f"{where} has the embedding {embedding!r}: accepted is a whole number from 1"
            )
        if not _is_list(blocks) or not blocks:
            raise BadInput(f"{where} has the blocks {blocks!r}: accepted is {ACCEPTED}")
        for index, block in enumerate(blocks):
            if not _is_list(block) or len(block) != 4 or not all(_is_width(w) for w in block):
                raise BadInput(
                    f"{where} has {block!r} for block {index}: accepted is [heads, qk, v, mlp], "
                    "whole numbers from 1"
                )
        return cls(embedding, tuple(BlockWidths(*block) for block in blocks))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def attention_widths(attn: nn.Module) -> tuple[int, int, int]:
    """(heads, qk, v) of timm's attention or a sliced one."""
    own = cast(Attention, attn)
    v = own.v_dim if isinstance(own, SlicedAttention) else own.head_dim
    return own.num_heads, own.head_dim, v


def model_widths(model: nn.Module) -> Widths:
    """The widths of a supported model, sliced or not."""
    check_supported(model)
    vit = cast(VisionTransformer, model)
    blocks = []
    for block in cast("Sequence[Block]", vit.blocks):
        # the last layer of any MLP leads out of its hidden width
        last = [m for m in block.mlp.modules() if isinstance(m, nn.Linear)][-1]
        blocks.append(BlockWidths(*attention_widths(block.attn), last.in_features))
    return Widths(vit.embed_dim, tuple(blocks))


def widths_of(state: Mapping[str, Tensor]) -> Widths:
    """The widths of the sliced model that gave this state dict; BadInput if none did.

    Only the buffers `blocks.*.attn.widths` are read, and shapes.
    """
    blocks: list[BlockWidths] = []
    embedding = 0
    while any(name.startswith(f"blocks.{len(blocks)}.") for name in state):
        at = f"blocks.{len(blocks)}."
        needed = [at + part for part in ("attn.widths", "attn.qkv.weight", "attn.proj.weight")]
        hidden = next((at + p for p in ("mlp.fc2.weight", "mlp.w2.weight") if at + p in state), "")
        missing = [name for name in needed if name not in state]
        if missing or not hidden:
            what = missing[0] if missing else at + "mlp.fc2.weight"
            raise BadInput(f"the weights are not a sliced model's: they have no {what}")
        heads, qk, v = (int(w) for w in state[needed[0]].tolist())
        rows, columns = state[needed[1]].shape
        if rows != heads * (2 * qk + v) or state[needed[2]].shape[1] != heads * v:
            raise BadInput(
                f"the weights contradict themselves: {needed[0]} says {heads} heads with q and k "
                f"{qk} and v {v} wide, but {needed[1]} is {(rows, columns)} and {needed[2]} "
                f"{tuple(state[needed[2]].shape)}"
            )
        embedding = columns
        blocks.append(BlockWidths(heads, qk, v, state[hidden].shape[1]))
    if not blocks:
        raise BadInput("the weights are not a sliced model's: they have no blocks.0.attn.widths")
    return Widths(embedding, tuple(blocks))


def unshapable(model: nn.Module) -> dict[str, str]:
    """The dimensions ("embedding", "mlp") that this model's parts allow no other value for, each
    with the reason; {} where all can be set.
    """
    vit, why = cast(VisionTransformer, model), dict[str, str]()
    for index, block in enumerate(cast("Sequence[Block]", vit.blocks)):
        if type(block.mlp) not in INTO_HIDDEN or not isinstance(block.mlp.fc2, nn.Linear):
            kind = f"{type(block.mlp).__module__}.{type(block.mlp).__name__}"
            said = f"its MLP in block {index} is {kind}, accepted is timm's Mlp or SwiGLU"
            why = {"mlp": said, "embedding": said}
            break
    stem = getattr(vit.patch_embed, "proj", None)
    if not isinstance(stem, nn.Conv2d):
        why["embedding"] = f"its stem ends in {type(stem).__name__}, accepted is a convolution"
    if vit.attn_pool is not None:
        why["embedding"] = "its pooling by attention (MAP) is as wide as its input"
    for name, norm in embedding_norms(vit).items():
        vectors = [tuple(p.shape) == (vit.embed_dim,) for p in norm.parameters()]
        if not isinstance(norm, nn.Identity) and not hasattr(norm, "normalized_shape"):
            why["embedding"] = f"its {name} is {type(norm).__name__}, accepted is a layer norm"
        elif not all(vectors):
            why["embedding"] = f"its {name} has parameters that are not one a channel"
    return why


def fixed(model: nn.Module) -> dict[str, str]:
    """The dimensions ("embedding", "heads", "qk", "v", "mlp") that cannot be cut exactly in this
    model, each with the reason; {} where all can.

    A norm over the channels that are cut would see other statistics. For the embedding that is
    so by nature, and what is meant: LayerNorms over the kept channels.
    """
    why = unshapable(model)
    for index, block in enumerate(cast("Sequence[Block]", cast(VisionTransformer, model).blocks)):
        attn = cast(Attention, block.attn)
        if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
            why.setdefault("qk", f"q and k of block {index} are normalised over a head's width")
        if not isinstance(attn.norm, nn.Identity):
            for part in ("heads", "v"):
                why.setdefault(part, f"the attention of block {index} normalises its output")
        if not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
            why.setdefault("mlp", f"the MLP of block {index} normalises its hidden channels")
    return why


def refuse(model: nn.Module, before: Widths, after: Widths, why: Mapping[str, str]) -> None:
    """UnsupportedModel where a dimension named in `why` differs."""
    pairs = list(zip(before.blocks, after.blocks, strict=True))
    differ = {p: any(getattr(a, p) != getattr(b, p) for a, b in pairs) for p in PARTS}
    differ["embedding"] = before.embedding != after.embedding
    for part, reason in why.items():
        if differ[part]:
            raise UnsupportedModel(
                f"{type(model).__name__} cannot get another {PARTS.get(part, part)}: {reason}"
            )


def embedding_norms(vit: VisionTransformer) -> dict[str, nn.Module]:
    """The norms over the embedding, by name."""
    norms = {"norm_pre": vit.norm_pre, "norm": vit.norm, "fc_norm": vit.fc_norm}
    norms["patch_embed.norm"] = getattr(vit.patch_embed, "norm", nn.Identity())
    for index, block in enumerate(cast("Sequence[Block]", vit.blocks)):
        norms[f"blocks.{index}.norm1"], norms[f"blocks.{index}.norm2"] = block.norm1, block.norm2
    return cast("dict[str, nn.Module]", norms)
