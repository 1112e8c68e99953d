"""Log size on keys: as a mask, or as one channel more of q and k? Attention alone, both in turn.

    python tests/benchmarks/log_size.py                    # DeiT-S's attention, batch 16, 2 threads
    python tests/benchmarks/log_size.py --device cuda --dtype bfloat16 --batch 256 --heads 12

Proportional attention (ToMe, eq. 1) adds log s_j to the logits of key j. A mask [B, 1, 1, N] can
cost the flash kernel on a GPU; with q' = (q, 1, 0, …) and k' = (k, log s / scale, 0, …), padded to
a multiple of 8 channels, the fused kernel needs none. The time of building either is counted.
Prints, a line a number of tokens, the median of the rounds' ratios over no bias at all, with its
95 % interval, and the largest difference between the two.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitpareto.search.measure.timing import Clock, median_interval


def plain(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def mask(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().to(q.dtype)[:, None, None])


def channel(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    width = q.shape[-1]
    log = (size.log() * width**0.5).to(q.dtype)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    q = torch.cat([q, q.new_ones(*q.shape[:-1], 1), q.new_zeros(*q.shape[:-1], 7)], dim=-1)
    k = torch.cat([k, log, k.new_zeros(*k.shape[:-1], 7)], dim=-1)
    # the flash kernels want one width for q, k and v
    wide = F.pad(v, (0, 8))
    out = F.scaled_dot_product_attention(q, k, wide, scale=width**-0.5)
    return out[..., :width]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    clock = Clock(asked.device.startswith("cuda"))
    dtype = getattr(torch, asked.dtype)
    print(f"{asked.device}, {asked.dtype}, batch {asked.batch}, {asked.heads} heads of 64")
    for total in (197, 158, 119, 80):
        shape = (asked.batch, total, 3, asked.heads, 64)
        q, k, v = torch.randn(shape, device=asked.device, dtype=dtype).permute(2, 0, 3, 1, 4)
        size = torch.randint(1, 9, (asked.batch, total), device=asked.device).float()
        ways = (plain, mask, channel)
        with torch.inference_mode():
            off = (mask(q, k, v, size) - channel(q, k, v, size)).abs().max().item()
            calls = [partial(way, q, k, v, size) for way in ways]
            for call in calls * 5:
                call()
            times = np.array([[clock(call) for call in calls] for _ in range(asked.rounds)])
        said = []
        for way, ratio in zip(ways[1:], (times[:, 1:] / times[:, :1]).T, strict=True):
            low, high = median_interval(ratio)
            said.append(f"{way.__name__} {np.median(ratio):.3f} ({low:.3f}–{high:.3f})")
        print(f"{total:>4} tokens  {'  '.join(said)}  difference {off:.1e}", flush=True)


if __name__ == "__main__":
    main()
