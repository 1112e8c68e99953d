"""Every ViT of timm, pruned: which entry points `methods` accepts, and whether they come out right.

    nice python tests/benchmarks/sweep_timm.py [--match 'vit_small*'] [--look]

Each entry point that builds a VisionTransformer is built without data and either refused by name or
really pruned: its first three blocks with random weights, two random images at its own input size,
float32 (`Trial` says what is compared). `--look` only builds and asks. The tables that it prints
are those of methods/README.md; a line a model goes to standard error. At most 6 GB.
"""

from __future__ import annotations

import argparse
import collections
import gc
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitpareto import methods
from vitpareto.search.measure import macs
from vitpareto.search.measure.fvcore_macs import fvcore_macs

#: blocks that are run; `check_supported` has looked at all of them
DEPTH = 3
#: with more patches than this the input is halved, for memory's sake: SigLIP at 896 alone
MOST = 2048
IDENTITY = ("topk", "tome", "rajni", "ats", "ppt")
#: one part in so many of the logits' spread is float32 rounding; the float64 of near ties
CLOSE, EXACT = 1e-4, 1e-9
#: what a family's entry points have in their names, and what it is called
FAMILIES = {
    "deit3_": "DeiT-3", "deit_": "DeiT", "siglip": "SigLIP", "clip": "CLIP", "dinov2": "DINOv2",
    "tips": "TIPSv2", "radio": "RADIO", "aimv2": "AIMv2", "vitamin": "ViTamin", "beit3": "BEiT-3",
    "flexivit": "FlexiViT", "eva_": "EVA", "intern": "InternViT", "mci": "MobileCLIP",
    "_r26": "R+ViT", "_r50": "R+ViT", "_r_s16": "R+ViT", "resnet": "R+ViT", "": "ViT",
}  # fmt: skip


def settings(patches: int) -> dict[str, dict[str, Any]]:
    """What is pruned with, for a model of so many patches: every token method that is published."""
    staged = {"keep_rate": 0.7, "prune_layers": (0, 1)}
    rates = {"prune_layers": (1, 2), "keep_rates": (0.7, 0.5)}
    chosen = {
        "topk": staged,
        "tome": {"r": patches // 10},
        "tram": staged,
        "evit": staged,
        "ppt": {"r": patches // 8, "prune_layers": (0, 1)},
        "ats": {"prune_layers": (0, 1)},
        # counts, not a budget: what images decide may be to keep all
        "rajni": {"counts": [int(patches * rate) for rate in (0.9, 0.7, 0.6)]},
        "tnt": {**rates, "similarity_prune": patches // 20},
        "dynamicvit": rates,
        "patchmerger": {"prune_layers": (0, 1), "num_tokens": (patches // 2, patches // 4)},
    }
    published = {n for n in methods.names("tokens") if not methods.get(n).control}
    assert chosen.keys() == published, "a method without a setting, or a setting without one"
    return chosen


@dataclass
class Entry:
    """An entry point: what it is made of, or why it is refused (or was not built)."""

    name: str
    vit: bool = False
    gmacs: float = 0.0
    refused: str = ""
    broken: str = ""
    prefix: str = ""
    pooling: str = ""
    parts: list[str] = field(default_factory=list)


def empty(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False).eval()


def look(name: str) -> Entry:
    """Builds it without data and asks whether it can be pruned."""
    try:
        model = empty(name)
    except Exception as error:  # a sweep tells what it could not build and goes on
        return Entry(name, broken=f"{type(error).__name__}: {error}"[:160])
    entry = Entry(name, vit=isinstance(model, VisionTransformer))
    try:
        methods.check_supported(model)
    except methods.UnsupportedModel as error:
        entry.refused = f"{error.details['part']} is {error.details['got']}"
        return entry
    shape = methods.model_shape(model)
    entry.gmacs = shape.macs(shape.dense_counts(), "mid-block") / 1e9
    registers, block = model.num_reg_tokens, model.blocks[0]
    if isinstance(model, VisionTransformerDistilled):
        entry.prefix = "class and distillation"
    elif model.cls_token is not None:
        entry.prefix = "class and registers" if registers else "class"
    else:
        entry.prefix = "registers" if registers else "none"
    entry.pooling = {"avg": "average", "map": "MAP"}.get(model.global_pool, model.global_pool)
    has = {
        "LayerScale": not isinstance(block.ls1, nn.Identity),
        "`norm_pre`": not isinstance(model.norm_pre, nn.Identity),
        "q/k-norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale norm": not isinstance(block.attn.norm, nn.Identity),
        "RMS norm": not isinstance(block.norm1, nn.LayerNorm),
        "gated MLP": type(block.mlp).__name__ != "Mlp",
        "convolutional stem": hasattr(model.patch_embed, "backbone"),
    }
    entry.parts = [part for part, there in has.items() if there]
    return entry


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model on the CPU with random weights, such that attention is far from uniform."""
    model = model.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(generator=draw)
            if p.dim() == 1:
                p.mul_(0.2).add_(1.0 if name.endswith(("weight", "gamma")) else 0.0)
            elif p.dim() == 3:  # positions, class token, registers, latents
                p.mul_(0.5)
            else:
                p.mul_((2.0 if "qkv" in name else 1.0) / p[0].numel() ** 0.5)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        held = sum(len(list(m.buffers())) for m in norms)
        assert held == len(list(model.buffers())), "a buffer that nobody fills"
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0
            norm.train()
        if norms:
            model.patch_embed(torch.randn(2, 3, *model.patch_embed.img_size, generator=draw))
    return model.eval()


@dataclass
class Trial:
    """What came of one model, differences as a share of its logits' standard deviation.

    identity: reduced forward at identity settings against timm's own. alone: an image's logits in a
    batch against the image alone, where both chose the same. ties: settings of which float32's
    choices differ between the two (then float64 decides). fvcore: closed-form MACs of the dense
    model against fvcore's count. wrong: those beyond their limits, and numbers of tokens that are
    not the schedule's (or outside its bounds, where each image decides).
    """

    identity: float = 0.0
    alone: float = 0.0
    ties: int = 0
    fvcore: float = 0.0
    wrong: list[str] = field(default_factory=list)


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, methods.Trace]:
    with torch.no_grad():
        return model(images, trace=True)


def same_choice(together: methods.Trace, alone: methods.Trace) -> bool:
    return all(torch.equal(a[1:], b) for a, b in zip(together.group, alone.group, strict=True))


def prune_by(model: nn.Module, name: str, params: dict, images: Tensor, trial: Trial) -> None:
    """One method at one setting, into `trial`. Trained parts are drawn, far from indifferent."""
    pruned = methods.prune(model, name, **params)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in pruned.get_submodule("reduction").parameters():
            if p.dim() > 1:
                p.normal_(generator=draw).mul_(2 / p.shape[-1] ** 0.5)
    said, trace = run(pruned, images)
    own, alone = run(pruned, images[1:])
    shape, spread = methods.model_shape(pruned), float(said.std())
    step = pruned.recipe.tokens
    few, many = step.declared.bounds(step.params, shape)
    for block, tokens in enumerate(trace.tokens):
        patches = tokens - shape.prefix
        if patches.min() < few[block] or patches.max() > many[block]:
            trial.wrong.append(f"{name}: {patches.tolist()} patches after block {block}")
    if (trace.tokens[-1] - shape.prefix).min() >= shape.patches:
        trial.wrong.append(f"{name}: nothing was pruned")
    if not said.isfinite().all():
        trial.wrong.append(f"{name}: logits that are not finite")
    off, limit = float((said[1] - own[0]).abs().max()) / spread, CLOSE
    if not same_choice(trace, alone):
        trial.ties += 1
        pruned, limit = pruned.double(), EXACT
        said, trace = run(pruned, images.double())
        own, alone = run(pruned, images[1:].double())
        off = float((said[1] - own[0]).abs().max()) / spread
        if not same_choice(trace, alone):
            trial.wrong.append(f"{name}: another choice in a batch, in float64 too")
    else:
        trial.alone = max(trial.alone, off)
    if not off <= limit:
        trial.wrong.append(f"{name}: in a batch logits are off by {off:.1e}")


def try_out(name: str) -> Trial:
    """Prunes one accepted model by every method of `settings` (see `Trial`)."""
    model = empty(name)
    kinds = set(methods.model_shape(model).blocks)
    model.blocks = model.blocks[:DEPTH]
    model = filled(model)
    if model.patch_embed.num_patches > MOST:
        model.set_input_size(img_size=[side // 2 for side in model.patch_embed.img_size])
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=draw)
    trial = Trial()
    if len(kinds) > 1:
        trial.wrong.append("its blocks are not all alike: three do not stand for them")
    with torch.no_grad():
        dense = model(images[:1])
    for method in IDENTITY:
        said, _ = run(methods.prune(model, method, **methods.get(method).identity), images[:1])
        trial.identity = max(trial.identity, float((said - dense).abs().max() / dense.std()))
    if not trial.identity <= CLOSE:
        trial.wrong.append(f"identity settings are off by {trial.identity:.1e}")
    counted = fvcore_macs(model, images[:1])
    trial.fvcore = abs(macs(model) / counted - 1)
    if trial.fvcore > 1e-3:
        trial.wrong.append(f"closed form {macs(model):.0f} MACs, fvcore {counted:.0f}")
    for method, params in settings(methods.model_shape(model).patches).items():
        prune_by(model, method, params, images, trial)
    return trial


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Markdown."""
    header = list(header)
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"


def by_family(entries: Iterable[Entry]) -> str:
    """`ViT 41, CLIP 26, …`."""
    found = collections.Counter(
        next(name for sign, name in FAMILIES.items() if sign in e.name) for e in entries
    )
    return ", ".join(f"{name} {n}" for name, n in found.most_common())


def report(entries: list[Entry]) -> Iterator[str]:
    """The tables: accepted by prefix tokens and pooling, refused by reason."""
    vits = [e for e in entries if e.vit]
    taken = [e for e in vits if not e.refused]
    kinds = collections.defaultdict(list)
    for entry in taken:
        kinds[entry.prefix, entry.pooling].append(entry)
    rows = []
    for (prefix, pooling), group in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        parts = collections.Counter(part for entry in group for part in entry.parts)
        said = ", ".join(f"{part} {n}" for part, n in parts.most_common())
        rows.append((prefix, pooling, len(group), by_family(group), said))
    rows.append(("all", "", len(taken), "", ""))
    header = ("prefix tokens", "pooling", "entry points", "families", "of them with")
    yield from table(header, rows)
    yield ""
    reasons = collections.defaultdict(list)
    for entry in vits:
        if entry.refused:
            reasons[entry.refused.replace("timm.models.vision_transformer.", "")].append(entry.name)
    rows = [
        (why, len(names), ", ".join(f"`{n}`" for n in names))
        for why, names in sorted(reasons.items(), key=lambda reason: -len(reason[1]))
    ]
    yield from table(("refused: its", "entry points", "which"), rows)
    yield ""
    others = [e for e in entries if e.refused and not e.vit]
    by_class = sum(e.refused.startswith("class is ") for e in others)
    yield (
        f"Of timm {timm.__version__}'s {len(entries)} entry points {len(vits)} build a "
        f"`VisionTransformer`: {len(taken)} accepted, {len(vits) - len(taken)} refused. The other "
        f"{len(others)} are refused, {by_class} by their class."
    )


def verdict(trials: dict[str, Trial], spent: float) -> Iterator[str]:
    """What the pruned models came to, worst first."""
    wrong = {name: trial for name, trial in trials.items() if trial.wrong}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    yield (
        f"{len(trials)} pruned by {', '.join(settings(1))}: {len(trials) - len(wrong)} right, "
        f"{len(wrong)} wrong. Identity settings of {', '.join(IDENTITY)} are off by at most "
        f"{max(t.identity for t in trials.values()):.1e} of the logits' spread; an image in a "
        f"batch by {max(t.alone for t in trials.values()):.1e} "
        f"({sum(t.ties for t in trials.values())} near ties of float32 decided in float64); "
        f"closed-form MACs by {max(t.fvcore for t in trials.values()):.1e} of fvcore's. "
        f"{spent / 60:.0f} min, {peak:.1f} GB."
    )
    for name, trial in wrong.items():
        yield f"  wrong {name}: {'; '.join(trial.wrong)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only names with this wildcard")
    parser.add_argument("--look", action="store_true", help="build and ask, prune nothing")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    entries = [look(name) for name in timm.list_models(args.match)]
    print("\n".join(report(entries)), flush=True)
    broken = [e for e in entries if e.broken]
    for entry in broken:
        print(f"  not built {entry.name}: {entry.broken}", flush=True)
    trials: dict[str, Trial] = {}
    # the cheapest first
    for entry in sorted(entries, key=lambda e: e.gmacs):
        if args.look or not entry.gmacs:
            continue
        begin = time.perf_counter()
        trials[entry.name] = trial = try_out(entry.name)
        gc.collect()
        took = time.perf_counter() - begin
        print(f"{entry.name} {took:.0f} s {trial}", file=sys.stderr, flush=True)
    if trials:
        print("\n" + "\n".join(verdict(trials, time.perf_counter() - start)), flush=True)
    return int(bool(broken) or any(t.wrong for t in trials.values()))


if __name__ == "__main__":
    sys.exit(main())
