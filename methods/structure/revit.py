"""ReViT (Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023,
arXiv:2110.04869, section 5): the widths that NViT's pruning leads to, as a rule for a ViT with any
embedding that is trained from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.engine.method import Method
from vitpareto.methods.engine.method_declaration import PUBLISHED_DEPTH, Preset
from vitpareto.methods.engine.method_registry import register
from vitpareto.methods.engine.parameters import Float, Int
from vitpareto.methods.engine.reduced_model import UnsupportedModel
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.slicing.sliced_model import BlockWidths, Widths, model_widths, sliced_model
from vitpareto.methods.structure.nvit import NViT


def redistributed(embedding: int, depth: int = PUBLISHED_DEPTH) -> Widths:
    """ReViT's widths: v has 64 channels per head; blocks near both ends have few heads and a narrow
    q/k, those in the middle many heads and a wide MLP, the first and the last block 10 heads.

    The rule is published for 12 blocks. With another depth a block is like that of 12 blocks at the
    nearest relative position. Widths that would round to zero are one unit.
    """
    small, wide = max(1, round(0.005 * embedding)), max(1, round(0.05 * embedding / 8))
    blocks = []
    for block in range(depth):
        position = round(block * (PUBLISHED_DEPTH - 1) / max(1, depth - 1))
        middle, edge = 3 <= position <= 8, position in (0, PUBLISHED_DEPTH - 1)
        blocks.append(
            BlockWidths(
                heads=10 if edge else (4 if middle else 2) * small,
                qk=(16 if middle or edge else 8) * wide,
                v=64,
                mlp=(6 if middle else 3) * embedding,
            )
        )
    return Widths(embedding, tuple(blocks))


@register
class ReViT(Method):
    """The given model (patches, tokens, norms, head) with redistributed widths and fresh weights,
    initialised as timm does with torch's generator, to be trained from scratch. It is another
    model, so there is no identity.
    """

    name = "revit"
    summary = "NViT's redistribution of widths as a rule, trained from scratch"
    paper = NViT.paper
    kind = "structure"
    site = "the weights"
    training = "required"
    parameters = (Int("embedding", "width of the tokens", low=1, high=8192),)
    space = (
        Float("width", "embedding, as a fraction of the model's, rounded to multiples of 16",
              low=0.25, high=1.0),
    )  # fmt: skip
    presets = (
        Preset("ReViT-T", {"embedding": 176}, "ReViT's README, 5.16 M parameters"),
        Preset("ReViT-S", {"embedding": 384}, "ReViT's README, 22.74 M parameters"),
    )

    def resolve(self, choices: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
        if "embedding" in choices:
            return dict(choices)
        return {"embedding": 16 * max(1, round(choices["width"] * shape.dim / 16))}

    def is_dense(self, params: dict[str, Any], shape: ModelShape) -> bool:
        return False

    def restructure(
        self,
        model: nn.Module,
        params: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        own = model_widths(model)
        widths = redistributed(params["embedding"], len(own.blocks))
        table = cast(VisionTransformer, model).pos_embed
        held = None if table is None or table.requires_grad else table.detach().clone()
        if held is not None and widths.embedding != own.embedding:
            raise UnsupportedModel(
                f"the embedding of {type(model).__name__} cannot change: its position embeddings "
                "are fixed, and those of another width are not known",
                model=type(model).__name__,
                part="embedding",
                reason="fixed position embeddings",
            )
        built = sliced_model(model, widths)
        vit = cast(VisionTransformer, built)
        if not next(vit.parameters()).is_meta:
            vit.init_weights()
            if held is not None:
                cast(Tensor, vit.pos_embed).data.copy_(held)
        return built
