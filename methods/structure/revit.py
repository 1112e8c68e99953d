"""ReViT (Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023,
arXiv:2110.04869, section 5): what NViT's pruning found about a ViT's dimensions, as a rule for
building one of any embedding and training it from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitpareto.methods.engine.method import PUBLISHED_DEPTH, Method, Preset
from vitpareto.methods.engine.parameters import Float, Int
from vitpareto.methods.engine.reduced_model import UnsupportedModel
from vitpareto.methods.engine.registry import register
from vitpareto.methods.engine.shape import ModelShape
from vitpareto.methods.slicing.sliced_model import BlockWidths, Widths, model_widths, sliced_model
from vitpareto.methods.structure.nvit import NViT


def redistributed(embedding: int, depth: int = PUBLISHED_DEPTH) -> Widths:
    """ReViT's widths: v 64 a head; few heads and a narrow q/k near both ends, many heads and a
    wide MLP in the middle, and 10 heads in the first and the last block.

    Published for 12 blocks. Of another depth, block b is as the one of 12 at the nearest relative
    place, the first as the first and the last as the last. Small embeddings round to one unit
    where the rule would round to none.
    """
    small, wide = max(1, round(0.005 * embedding)), max(1, round(0.05 * embedding / 8))
    blocks = []
    for block in range(depth):
        place = round(block * (PUBLISHED_DEPTH - 1) / max(1, depth - 1))
        middle, edge = 3 <= place <= 8, place in (0, PUBLISHED_DEPTH - 1)
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
    """The given model's form (patches, tokens, norms, head) with redistributed dimensions and
    fresh weights, drawn from torch's generator as timm does, to be trained from scratch: there is
    no identity, it is another model.
    """

    name = "revit"
    summary = "NViT's redistribution of dimensions as a rule, trained from scratch"
    paper = NViT.paper
    kind = "structure"
    site = "the weights"
    training = "required"
    parameters = (Int("embedding", "width of the tokens", low=1, high=8192),)
    space = (
        Float("width", "embedding, as a fraction of the model's own, in whole 16s",
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
                f"{type(model).__name__} cannot get another embedding: its positions are a table "
                "that does not train, and which one it would be at another width is not known"
            )
        made = sliced_model(model, widths)
        vit = cast(VisionTransformer, made)
        if not next(vit.parameters()).is_meta:
            vit.init_weights()
            if held is not None:
                cast(Tensor, vit.pos_embed).data.copy_(held)
        return made
