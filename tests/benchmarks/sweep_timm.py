"""Which of timm's entry points `methods` accepts: builds each on the meta device and asks.

    python tests/benchmarks/sweep_timm.py [--limit N] [--match vit_*] [--exact N]

Accepted means: `methods.model_shape` gives closed-form dimensions. Refused means: UnsupportedModel
names the part. Anything else is an error and is listed. `--exact N` also builds N small accepted
models with random weights and compares the reduced forward at an identity setting with timm's own.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import warnings
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import methods


def sweep(names: list[str]) -> dict[str, dict[str, str]]:
    """{"accepted" | "refused" | "error": {entry point: why}}."""
    found: dict[str, dict[str, str]] = {"accepted": {}, "refused": {}, "error": {}}
    for name in names:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
        except Exception as error:  # a sweep reports what it could not build and goes on
            found["error"][name] = f"not built: {type(error).__name__}: {error}"[:160]
            continue
        try:
            shape = methods.model_shape(model)
        except methods.UnsupportedModel as error:
            inside = "ViT: " if isinstance(model, VisionTransformer) else "other: "
            said = str(error).split(" cannot be pruned: ")[1]
            found["refused"][name] = inside + said
        except Exception as error:
            found["error"][name] = f"{type(error).__name__}: {error}"[:160]
        else:
            macs = shape.macs(shape.dense_counts(), "mid-block") / 1e9
            found["accepted"][name] = f"{shape.depth} blocks, {shape.patches} patches, {macs:.3f} G"
    return found


def exact(names: list[str]) -> None:
    """Largest difference between the reduced forward and timm's, float32, random weights."""
    for name in names:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False).eval()
        size = model.patch_embed.img_size
        images = torch.randn(2, 3, *size)
        with torch.inference_mode():
            dense = model(images)
            pruned = methods.prune(model, "topk", keep_rate=1.0, prune_layers=())
            off = (pruned(images) - dense).abs().max().item()
        largest = dense.abs().max().item()
        print(f"{name:60} off by {off:.1e}, logits up to {largest:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="only the first N entry points")
    parser.add_argument("--match", default="", help="only names with this wildcard")
    parser.add_argument("--exact", type=int, default=0, help="compare logits of N small models")
    parser.add_argument("--list", action="store_true", help="name every accepted model")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = timm.list_models(args.match)[: args.limit]
    start = time.perf_counter()
    found = sweep(names)
    spent = time.perf_counter() - start
    print(", ".join(f"{len(v)} {k}" for k, v in found.items()), f"of {len(names)}, {spent:.0f} s")
    reasons = collections.Counter(found["refused"].values())
    for reason, count in reasons.most_common(400 if args.list else 40):
        print(f"  {count:5} refused: {reason}")
    for name, why in found["error"].items():
        print(f"  error {name}: {why}")
    if args.list:
        for name, why in found["accepted"].items():
            print(f"  accepted {name}: {why}")
    if args.exact:
        small = sorted(found["accepted"], key=lambda n: float(found["accepted"][n].split()[-2]))
        step = max(1, len(small) // 3 // args.exact)
        exact(small[::step][: args.exact])


if __name__ == "__main__":
    main()
