"""Correctness of a model on each image of a slice of a split, and batches that fit into memory."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from vitpareto import methods
from vitpareto.methods import BadInput, Code, ModelShape, Recipe, recipe_of
from vitpareto.search import choices
from vitpareto.search.data.decoded import Split
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.measure.closed_form import padded_counts, schedule_macs

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in choices.DTYPES}


#: messages of torch's CPU allocator and oneDNN, which raise a plain RuntimeError without memory
MEMORY_MESSAGES = (
    "DefaultCPUAllocator: can't allocate",
    "could not create a primitive",
    "could not create a memory object",
)

T = TypeVar("T")


class NonFiniteLogits(RuntimeError):
    """The model returned NaN or infinite logits, so its accuracy would be meaningless.

    `image` is the first such image: its index in the split, or its name.
    """

    def __init__(self, message: str, image: int | str) -> None:
        super().__init__(message, image)
        self.image = image

    def __str__(self) -> str:
        return str(self.args[0])


class OutOfMemory(RuntimeError):
    """A single image does not fit into memory."""


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a GPU or the machine is out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    known = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, known) or any(text in str(error) for text in MEMORY_MESSAGES)


def largest_fitting_batch(batch: int, attempt: Callable[[int], T]) -> tuple[int, T]:
    """Run `attempt` at batch, batch/2, batch/4, … until it fits into memory.

    Returns the batch size that fits and the result of `attempt` at it.

    Raises:
        OutOfMemory: a single image does not fit. Any other error of `attempt` passes through.
    """
    while True:
        try:
            return batch, attempt(batch)
        except (RuntimeError, MemoryError, OSError) as error:
            if not out_of_memory(error):
                raise
            why = str(error).strip().splitlines()[0] if str(error).strip() else "no memory"
        # after the except block, which releases the error and the frames that hold tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if batch == 1:
            raise OutOfMemory(f"out of memory with a single image: {why}")
        batch //= 2


@dataclass(frozen=True)
class Correctness:
    """Correctness and cost of each image of a slice.

    Attributes:
        top1, top5: bool [M], whether image i is classified correctly.
        macs: MACs per image as run, padding included. None unless images decide the cost.
        macs_each: [M], MACs of each image alone. None unless images decide the cost.
    """

    top1: np.ndarray
    top5: np.ndarray
    macs: float | None = None
    macs_each: np.ndarray | None = None

    @property
    def macs_mean(self) -> float | None:
        """Mean MACs of an image alone."""
        return None if self.macs_each is None else float(self.macs_each.mean())

    def then(self, later: Correctness) -> Correctness:
        """This slice followed by the one after it."""
        images, more = len(self.top1), len(later.top1)
        macs = each = None
        if self.macs is not None and later.macs is not None:
            macs = (images * self.macs + more * later.macs) / (images + more)
        if self.macs_each is not None and later.macs_each is not None:
            each = np.concatenate([self.macs_each, later.macs_each])
        return Correctness(
            np.concatenate([self.top1, later.top1]),
            np.concatenate([self.top5, later.top5]),
            macs,
            each,
        )


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
    """Normalised batches [B, 3, H, W] of images start..stop-1 of a split, and labels [B]."""
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
    """Correctness of `model` on images start..stop-1.

    Args:
        head_indices: the logits that stand for the data's classes; all if None.
        progress: called with the number of images of each batch.

    Raises:
        NonFiniteLogits: the logits of an image are not finite.
        BadInput: the range contains no image.
    """
    cost = _cost_by_image(model)
    columns = None if head_indices is None else torch.tensor(head_indices, device=device)
    hits: list[tuple[Tensor, Tensor]] = []
    seen = 0
    for images, labels in batches_of(
        split, preprocess, batch=batch, device=device, dtype=dtype, start=start, stop=stop
    ):
        logits = (model(images) if cost is None else cost.forward(model, images)).float()
        if columns is not None:
            logits = logits[:, columns]
        _check_finite(logits, start + seen, split.name)
        hits.append(_hits(logits, labels))
        seen += len(images)
        if progress is not None:
            progress(len(images))
    if not seen:
        raise _no_images(split, start, stop)
    top1, top5 = (torch.cat(part).numpy() for part in zip(*hits, strict=True))
    if cost is None:
        return Correctness(top1, top5)
    return Correctness(top1, top5, cost.as_run / seen, np.array(cost.alone, dtype=np.float64))


def _no_images(split: Split, start: int, stop: int | None) -> BadInput:
    end = len(split) if stop is None else stop
    return BadInput(
        f"the range must contain an image (got {start}..{end} of the {len(split)} images of "
        f"{split.name!r})",
        Code.EMPTY,
        name=split.name,
        got=(start, end),
        images=len(split),
    )


def _hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether labels [B] are the largest, and among the 5 largest, of logits [B, K]: bool [B]."""
    matches = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return matches[:, 0].cpu(), matches.any(dim=1).cpu()


def _check_finite(logits: Tensor, first: int, name: str) -> None:
    """Raises NonFiniteLogits. first: index in the split `name` of the first row of the logits."""
    finite = logits.isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = first + int((~finite).nonzero()[0, 0])
        raise NonFiniteLogits(f"non-finite logits, first for image {bad} of {name}", bad)


@dataclass
class _CostByImage:
    """Adds up the MACs of a model whose images decide the token counts.

    Attributes:
        as_run: MACs of all images, padding included.
        alone: MACs of each image alone.
    """

    recipe: Recipe
    shape: ModelShape
    as_run: float = 0.0
    alone: list[int] = field(default_factory=list)

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """The logits of the images, whose cost is added."""
        logits, trace = model(images, trace=True)
        padded = padded_counts(trace.tokens, self.shape.prefix)
        self.as_run += len(images) * schedule_macs(self.recipe, self.shape, padded)
        counts = (torch.stack(trace.tokens, dim=1) - self.shape.prefix).tolist()
        self.alone += [schedule_macs(self.recipe, self.shape, row) for row in counts]
        return cast(Tensor, logits)


def _cost_by_image(model: nn.Module) -> _CostByImage | None:
    """None unless images decide the model's token counts."""
    recipe = recipe_of(model)
    if recipe.tokens is None:
        return None
    shape = methods.model_shape(model)
    fixed = recipe.tokens.declared.counts(recipe.tokens.params, shape) is not None
    return None if fixed else _CostByImage(recipe, shape)
