"""Does speed follow MACs? Each method beside the dense model, in turn, in one run.

    python tests/benchmarks/speed.py                       # DeiT-S, batch 16 and 1, 2 CPU threads
    python tests/benchmarks/speed.py --device cuda --model deit_base_patch16_224 \
        --batch 256 --dtype bfloat16 --compile             # both sides compiled

Prints, a line a setting: the MACs ratio (dense over pruned), the speed-up (median of the rounds'
paired ratios, 95 % interval), their quotient (1: as fast as the MACs promise), and the peak memory
over the dense model's; of settings that `--only` leaves out, MACs and memory alone. Random weights:
neither speed nor MACs depend on them.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitpareto import methods
from vitpareto.search.measure import macs
from vitpareto.search.measure.memory import peak_mb
from vitpareto.search.measure.timing import measure_latency

SETTINGS = {
    "tome r=13": ("tome", {"r": 13}),
    "ppt r=50": ("ppt", {"r": 50}),
    "topk 75%": ("topk", {"keep_rate": 0.75}),
    "tram 75%": ("tram", {"keep_rate": 0.75}),
    "evit 75%": ("evit", {"keep_rate": 0.75}),
    "tnt 75%": ("tnt", {"prune_layers": (3, 6, 9), "keep_rates": (0.75, 0.75, 0.75)}),
    "ats": ("ats", {}),
    "rajni": ("rajni", {"counts": (196, 196, 196, *(172,) * 3, *(150,) * 3, *(131,) * 3)}),
    "patchmerger": ("patchmerger", {"prune_layers": (3, 6, 9), "num_tokens": (147, 110, 82)}),
    "dynamicvit": ("dynamicvit", {"prune_layers": (3, 6, 9), "keep_rates": (0.75, 0.56, 0.42)}),
    "dense": ("dense", {}),
}
#: what speed is asked of; the others are there for their memory
FIXED = ("tome r=13", "ppt r=50", "topk 75%", "tram 75%", "evit 75%", "tnt 75%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--only",
        nargs="*",
        default=list(FIXED),
        choices=list(SETTINGS),
        metavar="SETTING",
        help="whose speed is asked, of: " + ", ".join(SETTINGS).replace("%", "%%"),
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=methods.Untrained)
    dtype = getattr(torch, asked.dtype)
    dense = timm.create_model(asked.model, pretrained=False).eval().to(asked.device, dtype)
    print(f"{asked.model}, {asked.device}, {asked.dtype}, {asked.threads} threads, compiled: "
          f"{asked.compile}")  # fmt: skip
    for batch in asked.batch:
        images = torch.randn(batch, 3, *dense.patch_embed.img_size, device=asked.device).to(dtype)
        base = peak_mb(dense, images)
        for name, (method, params) in SETTINGS.items():
            pruned = methods.prune(dense, method, **params)
            ratio = macs(dense) / macs(pruned, images)
            memory = peak_mb(pruned, images) / base
            if name not in asked.only:
                print(f"batch {batch:>3}  {name:<11} MACs {ratio:5.3f}  memory {memory:.3f}")
                continue
            ours, theirs = pruned, dense
            if asked.compile:
                # afresh for each: past dynamo's limit of models it would fall back to eager
                torch._dynamo.reset()
                ours, theirs = (torch.compile(m, fullgraph=True) for m in (pruned, dense))
            found = measure_latency(ours, theirs, images, rounds=asked.rounds)
            print(
                f"batch {batch:>3}  {name:<11} MACs {ratio:5.3f}  speed-up {found.speedup:5.3f} "
                f"({found.speedup_low:.3f}–{found.speedup_high:.3f})  quotient "
                f"{found.speedup / ratio:5.3f} ({found.speedup_low / ratio:.3f}–"
                f"{found.speedup_high / ratio:.3f})  {found.p50_ms:7.1f} ms  memory {memory:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
