"""timm's embedding of images as tokens.

The only module that uses a private part of timm: `VisionTransformer._pos_embed` adds the prefix
tokens and the position embeddings, and timm has no public function for it.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def embed_images(model: VisionTransformer, images: Tensor) -> Tensor:
    """The tokens [B, N, C] before block 0, prefix tokens first, of normalised images [B, 3, H, W].

    Without patch dropout, which `check_supported` refuses.
    """
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))
