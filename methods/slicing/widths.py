"""The widths of a model, which slicing changes: read from a model or from a state dict.

Also which widths cannot change because of a model's parts, and which cannot be cut exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from timm.layers.attention import Attention
from timm.layers.mlp import Mlp, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.engine.bad_input import BadInput, Code
from vitpareto.methods.engine.reduced_model import UnsupportedModel, check_supported
from vitpareto.methods.engine.sliced_block import SlicedAttention

#: MLPs whose hidden width can be set, each with the names of its input layers; `fc2` is the output
INTO_HIDDEN = {Mlp: ("fc1",), SwiGLU: ("fc1_g", "fc1_x")}


#: the input of `Widths.from_plain`
ACCEPTED = "{embedding: E, blocks: [[heads, qk, v, mlp], …]} with integers >= 1"
#: a block's widths, in words
PARTS = {"heads": "number of heads", "qk": "q/k width", "v": "v width", "mlp": "MLP hidden width"}
#: parameters over the embedding that are attributes of the model itself
EMBEDDED = ("cls_token", "dist_token", "reg_token", "pos_embed")


@dataclass(frozen=True)
class BlockWidths:
    """One block: number of heads, q/k width and v width per head, MLP hidden width."""

    heads: int
    qk: int
    v: int
    mlp: int


@dataclass(frozen=True)
class Widths:
    """Everything that slicing changes: the embedding of the model, and the widths of each block."""

    embedding: int
    blocks: tuple[BlockWidths, ...]

    def to_plain(self) -> dict[str, Any]:
        """A dict for YAML and JSON: {embedding: 176, blocks: [[heads, qk, v, mlp], …]}."""
        return {
            "embedding": self.embedding,
            "blocks": [[b.heads, b.qk, b.v, b.mlp] for b in self.blocks],
        }

    @classmethod
    def from_plain(cls, data: Any, where: str = "widths") -> Widths:
        """The widths from the output of `to_plain`. Raises BadInput; `where` is for its message."""

        def error(what: str, accepted: str, got: Any) -> BadInput:
            method, _, name = where.rpartition(".")
            return BadInput(
                f"{what} must be {accepted} (got {got!r})",
                Code.WRONG_TYPE,
                name=name,
                where=method,
                got=got,
                accepted=accepted,
            )

        if not isinstance(data, Mapping) or set(data) != {"embedding", "blocks"}:
            raise error(where, ACCEPTED, data)
        embedding, blocks = data["embedding"], data["blocks"]
        if not _is_width(embedding):
            raise error(f"the embedding of {where}", "an integer >= 1", embedding)
        if not _is_list(blocks) or not blocks:
            raise error(f"the blocks of {where}", "a list of [heads, qk, v, mlp]", blocks)
        for index, block in enumerate(blocks):
            if not _is_list(block) or len(block) != 4 or not all(_is_width(w) for w in block):
                accepted = "[heads, qk, v, mlp] with integers >= 1"
                raise error(f"block {index} of {where}", accepted, block)
        return cls(embedding, tuple(BlockWidths(*block) for block in blocks))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_width(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def attention_widths(attn: nn.Module) -> tuple[int, int, int]:
    """(heads, qk, v) of timm's attention or of a sliced one."""
    own = cast(Attention, attn)
    v = own.v_dim if isinstance(own, SlicedAttention) else own.head_dim
    return own.num_heads, own.head_dim, v


def model_widths(model: nn.Module) -> Widths:
    """The widths of a supported model, sliced or not."""
    check_supported(model)
    vit = cast(VisionTransformer, model)
    blocks = []
    for block in cast("Sequence[Block]", vit.blocks):
        # the last linear layer of any MLP is its output
        last = [m for m in block.mlp.modules() if isinstance(m, nn.Linear)][-1]
        blocks.append(BlockWidths(*attention_widths(block.attn), last.in_features))
    return Widths(vit.embed_dim, tuple(blocks))


def widths_of(state: Mapping[str, Tensor]) -> Widths:
    """The widths of the sliced model that this state dict is of. Raises BadInput if it is of none.

    Reads the buffers `blocks.*.attn.widths`, and shapes.
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
            raise _not_sliced(what)
        heads, qk, v = (int(w) for w in state[needed[0]].tolist())
        rows, columns = state[needed[1]].shape
        if rows != heads * (2 * qk + v) or state[needed[2]].shape[1] != heads * v:
            raise BadInput(
                f"the weights are inconsistent: {needed[0]} is {heads} heads, q/k width {qk} and v "
                f"width {v}, but {needed[1]} is {(rows, columns)} and {needed[2]} is "
                f"{tuple(state[needed[2]].shape)}",
                Code.MISMATCH,
                name="weights",
                key=needed[0],
                got=[heads, qk, v],
            )
        embedding = columns
        blocks.append(BlockWidths(heads, qk, v, state[hidden].shape[1]))
    if not blocks:
        raise _not_sliced("blocks.0.attn.widths")
    return Widths(embedding, tuple(blocks))


def _not_sliced(missing: str) -> BadInput:
    return BadInput(
        f"the weights must be those of a sliced model ({missing} is missing)",
        Code.MISMATCH,
        name="weights",
        missing=missing,
    )


def unshapable(model: nn.Module) -> dict[str, str]:
    """The widths ("embedding", "mlp") that cannot change because of this model's parts, each with
    the reason; {} if all can change.
    """
    vit, why = cast(VisionTransformer, model), dict[str, str]()
    for index, block in enumerate(cast("Sequence[Block]", vit.blocks)):
        if type(block.mlp) not in INTO_HIDDEN or not isinstance(block.mlp.fc2, nn.Linear):
            kind = f"{type(block.mlp).__module__}.{type(block.mlp).__name__}"
            reason = f"its MLP in block {index} must be timm's Mlp or SwiGLU (got {kind})"
            why = {"mlp": reason, "embedding": reason}
            break
    stem = getattr(vit.patch_embed, "proj", None)
    if not isinstance(stem, nn.Conv2d):
        why["embedding"] = f"its stem must end in a convolution (got {type(stem).__name__})"
    if vit.attn_pool is not None:
        why["embedding"] = "its attention pooling (MAP) has the width of its input"
    for name, norm in embedding_norms(vit).items():
        vectors = [tuple(p.shape) == (vit.embed_dim,) for p in norm.parameters()]
        if not isinstance(norm, nn.Identity) and not hasattr(norm, "normalized_shape"):
            why["embedding"] = f"its {name} must be a layer norm (got {type(norm).__name__})"
        elif not all(vectors):
            why["embedding"] = f"its {name} must have one parameter per channel"
    return why


def fixed(model: nn.Module) -> dict[str, str]:
    """The widths ("embedding", "heads", "qk", "v", "mlp") that cannot be cut exactly in this model,
    each with the reason; {} if all can.

    A norm over channels that are cut would have other statistics. For the embedding this is
    intended: its LayerNorms are over the kept channels.
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


def check_changes(model: nn.Module, before: Widths, after: Widths, why: Mapping[str, str]) -> None:
    """Raises UnsupportedModel if a width that `why` names changes. why: the reason per width."""
    pairs = list(zip(before.blocks, after.blocks, strict=True))
    differ = {p: any(getattr(a, p) != getattr(b, p) for a, b in pairs) for p in PARTS}
    differ["embedding"] = before.embedding != after.embedding
    for part, reason in why.items():
        if differ[part]:
            raise UnsupportedModel(
                f"the {PARTS.get(part, part)} of {type(model).__name__} cannot change: {reason}",
                model=type(model).__name__,
                part=part,
                reason=reason,
            )


def embedding_norms(vit: VisionTransformer) -> dict[str, nn.Module]:
    """The norms over the embedding by name."""
    norms = {"norm_pre": vit.norm_pre, "norm": vit.norm, "fc_norm": vit.fc_norm}
    norms["patch_embed.norm"] = getattr(vit.patch_embed, "norm", nn.Identity())
    for index, block in enumerate(cast("Sequence[Block]", vit.blocks)):
        norms[f"blocks.{index}.norm1"], norms[f"blocks.{index}.norm2"] = block.norm1, block.norm2
    return cast("dict[str, nn.Module]", norms)
