"""How processes that train together share a batch: each takes a part of the images, and gradients
are averaged by how many.

Every process draws the whole batch, whose shuffle and augmentation depend on the seed alone, and
takes its part. In a single process these functions do nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitpareto.methods import BadInput, Code


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many processes train together: (0, 1) in a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def local_share(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """This process's images and labels, and the fraction of the batch that they are.

    Raises BadInput if the batch has fewer images than there are processes.
    """
    rank, size = rank_and_size()
    if size == 1:
        return images, labels, 1.0
    if len(images) < size:
        raise BadInput(
            f"batch must be at least {size}, one image per process (got {len(images)})",
            Code.OUT_OF_RANGE,
            name="batch",
            got=len(images),
        )
    return images[rank::size], labels[rank::size], len(images[rank::size]) / len(images)


def average_gradients(model: nn.Module, loss: float, share: float) -> float:
    """Replace the gradients by those of the whole batch; returns the whole batch's loss.

    loss, share: of this process's part.
    """
    if rank_and_size()[1] == 1:
        return loss
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    device = gradients[0].device if gradients else torch.device("cpu")
    # one message: hundreds of small ones would wait for each other
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor([loss], device=device)])
    flat = flat.mul_(share)
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return float(flat[-1])
