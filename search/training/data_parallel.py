"""How processes that train together share a batch: by images, and gradients averaged by how many.

Each draws the whole batch, whose shuffle and augmentation depend on the seed alone, and takes its
part. In a process by itself all of this does nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def ranks() -> tuple[int, int]:
    """This process's number among those of its training, and how many there are: (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def own_share(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """This process's part of a batch, and what part of the batch that is. ValueError where there
    are fewer images than processes.
    """
    rank, world = ranks()
    if world == 1:
        return images, labels, 1.0
    if len(images) < world:
        raise ValueError(f"a batch of {len(images)} images cannot be shared by {world} processes")
    return images[rank::world], labels[rank::world], len(images[rank::world]) / len(images)


def whole_batch(model: nn.Module, loss: float, share: float) -> float:
    """The gradients of the whole batch in place of this share's, and the whole batch's loss."""
    if ranks()[1] == 1:
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
