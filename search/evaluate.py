"""Correctness of a model, image by image, on a slice of a split; nothing is aggregated here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import methods
from search.cost import padded_counts, recipe_of, schedule_macs
from search.datasets import Preprocess, Split

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NonFiniteLogits(RuntimeError):
    """The model gave NaN or infinite logits: its accuracy would be a meaningless number."""


@dataclass(frozen=True)
class Correctness:
    """top1, top5: bool [M], image i of the slice right. macs: per image as run, padding included,
    macs_mean: per image alone (both None unless images decide the cost).
    """

    top1: np.ndarray
    top5: np.ndarray
    macs: float | None = None
    macs_mean: float | None = None


def batches_of(
    split: Split,
    preprocess: Preprocess,
    *,
    batch: int,
    device: str | torch.device,
    dtype: torch.dtype,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches [B, 3, H, W] of images start..stop-1 of a split, with labels [B]."""
    stop = len(split) if stop is None else min(stop, len(split))
    for first in range(start, stop, batch):
        raw, labels = split.batch(first, min(first + batch, stop))
        yield preprocess.normalise(raw.to(device), dtype), labels.to(device)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    preprocess: Preprocess,
    *,
    batch: int,
    device: str | torch.device,
    dtype: torch.dtype,
    head_indices: tuple[int, ...] | None = None,
    start: int = 0,
    stop: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Correctness:
    """Correctness of `model` on images start..stop-1. `head_indices` restricts the logits.

    Raises NonFiniteLogits, naming the first image, and ValueError for a slice without images.
    """
    recipe, adaptive = recipe_of(model), False
    shape = None
    if recipe.tokens is not None:
        shape = methods.model_shape(model)
        adaptive = recipe.tokens.declared.counts(recipe.tokens.params, shape) is None
    columns = None if head_indices is None else torch.tensor(head_indices, device=device)
    top1: list[Tensor] = []
    top5: list[Tensor] = []
    as_run, alone, seen = 0.0, 0.0, 0
    for images, labels in batches_of(
        split, preprocess, batch=batch, device=device, dtype=dtype, start=start, stop=stop
    ):
        if adaptive and shape is not None:
            logits, trace = model(images, trace=True)
            counts = torch.stack(trace.tokens, dim=1) - shape.prefix
            as_run += len(images) * schedule_macs(
                recipe, shape, padded_counts(trace.tokens, shape.prefix)
            )
            alone += sum(schedule_macs(recipe, shape, row) for row in counts.tolist())
        else:
            logits = model(images)
        logits = logits.float()
        if columns is not None:
            logits = logits[:, columns]
        finite = logits.isfinite().all(dim=1)
        if not bool(finite.all()):
            bad = start + seen + int((~finite).nonzero()[0, 0])
            raise NonFiniteLogits(f"non-finite logits, first for image {bad} of {split.name}")
        order = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        top1.append(order[:, 0].cpu())
        top5.append(order.any(dim=1).cpu())
        seen += len(images)
        if progress is not None:
            progress(len(images))
    if not seen:
        end = len(split) if stop is None else stop
        raise ValueError(f"no images {start}..{end} in the {len(split)} of '{split.name}'")
    return Correctness(
        torch.cat(top1).numpy(),
        torch.cat(top5).numpy(),
        as_run / seen if adaptive else None,
        alone / seen if adaptive else None,
    )
