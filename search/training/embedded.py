"""Training of the embedded model: the recipe that made the shipped weights.

`vitpareto train-demo --out FILE` repeats it. `_TrainedViT` describes how it differs from usual
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from vitpareto.methods.engine.timm_embedding import embed_images
from vitpareto.search.data.embedded_images import (
    CLASSES,
    PATCH,
    SIZE,
    SPLITS,
    draw,
    glyphs,
    normalise,
    paint,
    source_digits,
)
from vitpareto.search.models.embedded_model import DEPTH, WIDTH, build
from vitpareto.search.training.loop import Epoch, fit
from vitpareto.search.training.optimizers import Optimization

EPOCHS = 70

#: fraction of training in which positions and clutter grow to their full range
_RAMP = 0.2
_BATCH = 64


def train_embedded(
    out: Path, epochs: int = EPOCHS, seed: int = 0, progress: Callable[[Epoch], None] | None = None
) -> dict[str, Any]:
    """Train the model from scratch and write its weights to `out` (safetensors, float32).

    The same seed gives the same weights, bit for bit, on one kind of processor with one torch
    build: training runs on one thread (5 to 10 minutes), so that the order of sums does not depend
    on the number of threads. The seed decides weights, order and shuffling; the drawings are always
    the same. Positions and clutter grow to their full range over the first fifth of training; after
    that each epoch sees `draw("train", epoch)`.

    Returns the settings, the last loss, and top-1 in percent on calibration, search and held-out;
    none of the three is used in training. Raises what `fit` raises.
    """
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = build(pretrained=False)
        _initialise(vit)
        labels = torch.from_numpy(glyphs().labels[source_digits("train")])

        def batches(epoch: int) -> list[tuple[Tensor, Tensor]]:
            images, corner = paint("train", epoch, min(1.0, epoch / (_RAMP * epochs)))
            inputs = normalise(images)
            targets = torch.cat([labels[:, None], torch.from_numpy(corner).T], dim=1)
            order = torch.randperm(len(labels)).split(_BATCH)
            return [(inputs[i], targets[i]) for i in order if len(i) == _BATCH]

        history = fit(
            _TrainedViT(vit),
            batches,
            Optimization(epochs, lr=3e-3, optimizer="nmuon", warmup_epochs=min(5, epochs / 10)),
            objective=_loss,
            progress=progress,
        )
    vit.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(safetensors.torch.save(vit.state_dict()))
    result: dict[str, Any] = {"epochs": epochs, "seed": seed, "loss": history[-1].loss}
    return result | {f"{split}_top1": top1(vit, split) for split in SPLITS if split != "train"}


def top1(model: nn.Module, split: str) -> float:
    """Top-1 accuracy of a model on a split of the embedded images, in percent."""
    images, labels = draw(split)
    with torch.inference_mode():
        guesses = [model(batch).argmax(1) for batch in normalise(images).split(100)]
    return 100 * float((torch.cat(guesses).numpy() == labels).mean())


class _TrainedViT(nn.Module):
    """The model with two additions that exist during training only.

    Without them the class token and most patches know the label after a few blocks, so that
    dropping patches in later blocks costs no accuracy, even at random. (With only the class tokens
    shuffled, and larger digits, random dropping at half the MACs had 94.0 % of 200 search images
    right, TopK 97.0 %.)

    - After block 6 or 7 the class tokens and the background are shuffled among the images of a
      batch, so that the label must be read from the digit's own patches. Where each digit was drawn
      is known.
    - Linear heads on the class token after blocks 2, 4 and 6 (deep supervision) make it attend to
      the digit in the blocks before.

    No patch is dropped or merged in training.
    """

    EARLY, SHUFFLE = (2, 4, 6), (6, 7)

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CLASSES))) for _ in self.EARLY
        )

    def forward(self, images: Tensor, corner: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, 10] of images [B, 3, S, S], and those of the early heads.

        `corner` [B, 2] is the first patch (y, x) of each digit's 2x2 patches.
        """
        vit = self.vit
        tokens = embed_images(vit, images)
        shuffle = self.SHUFFLE[int(torch.randint(len(self.SHUFFLE), ()))]
        early: list[Tensor] = []
        for index, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if index in self.EARLY:
                early.append(self.heads[len(early)](tokens[:, 0]))
            if index == shuffle:
                other = torch.randperm(len(tokens))
                keep = _digit_tokens(corner) | _digit_tokens(corner[other])
                tokens = torch.where(keep[..., None], tokens, tokens[other])
        return vit.forward_head(vit.norm(tokens)), early


def _digit_tokens(corner: Tensor) -> Tensor:
    """Which tokens a digit covers, class token first: bool [B, 1 + patches]."""
    offset = torch.arange(SIZE // PATCH) - corner[..., None]
    inside = (offset == 0) | (offset == 1)
    return F.pad((inside[:, 0, :, None] & inside[:, 1, None, :]).flatten(1), (1, 0))


def _initialise(vit: VisionTransformer) -> None:
    """Fresh weights at a scale for 64 channels: timm's 0.02 is for 768, and trains slowly here."""
    with torch.no_grad():
        grid = SIZE // PATCH
        assert vit.pos_embed is not None
        vit.pos_embed[0, 1:] = 0.3 * build_sincos2d_pos_embed([grid, grid], WIDTH)
        for block in vit.blocks:
            for name, weight in block.named_parameters():
                if weight.ndim == 2:
                    nn.init.xavier_uniform_(weight)
                    if "proj" in name or "fc2" in name:
                        weight.div_(math.sqrt(2 * DEPTH))


def _loss(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    labels, corner = targets[:, 0], targets[:, 1:]
    logits, early = model(images, corner)
    loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
    return loss + 0.3 * torch.stack([F.cross_entropy(e, labels) for e in early]).sum()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
