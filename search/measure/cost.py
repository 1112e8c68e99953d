"""What a model costs: MACs in closed form and by fvcore, parameters, peak memory, latency.

MACs are multiply-accumulates an image (1 multiply-add = 1) in fvcore's convention, with attention
counted: fvcore itself counts nothing for scaled_dot_product_attention, so that DeiT-S would read
4.251 G instead of 4.608 G and a search would optimise a wrong number.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitpareto import methods
from vitpareto.methods import BadInput, ModelShape, Recipe
from vitpareto.search.measure.latency import Latency

with warnings.catch_warnings():
    # fvcore scripts a loss function when it is imported, which torch deprecates
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=Warning)
    from fvcore.nn import FlopCountAnalysis


def recipe_of(model: nn.Module) -> Recipe:
    """The resolved recipe a pruned model was built from; the dense one for a plain timm model."""
    recipe = getattr(model, "recipe", None)
    return recipe if recipe is not None else Recipe()


def schedule_macs(recipe: Recipe, shape: ModelShape, counts: Sequence[int]) -> int:
    """MACs of one image with `counts` patches left after each block. `shape`: after the structure
    step. Closed form: the dense parts of the forward plus the method's own arithmetic.
    """
    counts = tuple(counts)
    if recipe.tokens is None:
        return shape.macs(shape.dense_counts(), "mid-block")
    declared = recipe.tokens.declared
    params = declared.check(recipe.tokens.params, shape)
    dense_parts = shape.macs(counts, declared.site, declared.entering(params, shape))
    return dense_parts + declared.extra_macs(params, shape, counts)


def recipe_macs(recipe: Recipe, shape: ModelShape) -> tuple[int, int]:
    """Fewest and most MACs an image this recipe can cost; equal where no image decides."""
    if recipe.tokens is None:
        dense = schedule_macs(recipe, shape, shape.dense_counts())
        return dense, dense
    declared = recipe.tokens.declared
    low, high = declared.bounds(declared.check(recipe.tokens.params, shape), shape)
    return schedule_macs(recipe, shape, low), schedule_macs(recipe, shape, high)


def macs(model: nn.Module, images: Tensor | None = None) -> float:
    """Multiply-accumulates per image of a dense or pruned model, in closed form.

    images [B, 3, H, W] are needed where they decide the cost (input-adaptive recipes): the cost is
    then as run, padding included, at this batch. BadInput says so if they are missing.
    """
    recipe, shape = recipe_of(model), methods.model_shape(model)
    low, high = recipe_macs(recipe, shape)
    counts = None
    if recipe.tokens is not None:
        counts = recipe.tokens.declared.counts(recipe.tokens.params, shape)
    if counts is not None or low == high:
        return float(high if counts is None else schedule_macs(recipe, shape, counts))
    if images is None:
        raise BadInput(
            f"the cost of {recipe} depends on the images: give images=, as in "
            "macs(model, images=batch)"
        )
    with torch.inference_mode():
        _, trace = model(images, trace=True)
    return float(schedule_macs(recipe, shape, padded_counts(trace.tokens, shape.prefix)))


def padded_counts(tokens: Sequence[Tensor], prefix: int) -> tuple[int, ...]:
    """What a batch pays for: the most patches any of its images has after each block."""
    return tuple(int(t.max()) - prefix for t in tokens)


def fvcore_macs(model: nn.Module, images: Tensor) -> float:
    """Multiply-accumulates per image as fvcore counts them on a traced forward, attention included.

    The second opinion on `macs`; they agree within 0.1 %. fvcore traces the forward: slow.
    """

    def attention(inputs: list[Any], outputs: list[Any]) -> int:
        q, k, v = (cast("list[int]", i.type().sizes()) for i in inputs[:3])
        return q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=Warning)
        # a shape read as a Python number is constant in the trace, which is what is wanted here
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        count = FlopCountAnalysis(model, images)
        count.set_op_handle("aten::scaled_dot_product_attention", attention)
        count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return float(count.total()) / images.shape[0]


def parameters(model: nn.Module) -> int:
    """How many numbers the model holds."""
    return sum(p.numel() for p in model.parameters())


class _LiveBytes(TorchDispatchMode):
    """Bytes of tensors alive that operations made inside this mode, and their peak.

    `there`: tensors that were alive before; a view of one of them is no new memory.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in there}

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def peak_mb(model: nn.Module, images: Tensor) -> float:
    """Peak memory of one forward over the batch `images`, weights included, in MB (1e6 bytes).

    On CUDA what the allocator saw; elsewhere the tensors alive between operations (an operation's
    own workspace is not seen there).
    """
    held = (*model.parameters(), *model.buffers())
    weights = sum(p.numel() * p.element_size() for p in held)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        with torch.inference_mode():
            model(images)
        peak = torch.cuda.max_memory_allocated(images.device) - before
    else:
        with torch.inference_mode(), _LiveBytes((*held, images)) as live:
            model(images)
        peak = live.peak
    return (weights + peak) / 1e6


@dataclass(frozen=True)
class Clock:
    """Times one call: CUDA events on GPUs, the wall clock elsewhere. Milliseconds."""

    cuda: bool

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the median from order statistics: the narrowest symmetric one whose exact
    binomial coverage is at least that. Below 6 values no such interval exists: their range.
    """
    ordered, n = np.sort(values), len(values)
    # the k-th value from each end is left out while P(Binomial(n, 1/2) <= k) stays within 2.5 %
    left_out, tail = 0, 1
    while 40 * (tail := tail + math.comb(n, left_out + 1)) <= 2**n:
        left_out += 1
    return float(ordered[left_out]), float(ordered[n - 1 - left_out])


def latency(
    candidate: Callable[[Tensor], Any],
    dense: Callable[[Tensor], Any],
    images: Tensor,
    rounds: int = 30,
    warmup: int = 5,
    runtime: str = "eager",
) -> Latency:
    """Candidate and dense in turn on the batch `images`, `inference_mode` (decision 6), as they
    come; runtime: what runs both, for the target (`runtimes.prepared` makes them so).

    Each round times both, the order alternating, so that a drift of the machine hits both; the
    speed-up is the median of the rounds' ratios dense / candidate, with its 95 % interval.
    """
    if rounds < 1:
        raise BadInput(f"latency needs at least one round, got {rounds}")
    clock = Clock(images.is_cuda)
    ours, theirs = np.zeros(rounds), np.zeros(rounds)
    # CUDA events are recorded on the current device, which need not be the images'
    here = torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext()
    with torch.inference_mode(), here:
        for _ in range(warmup):
            candidate(images)
            dense(images)
        for i in range(rounds):
            if i % 2:
                theirs[i] = clock(lambda: dense(images))
                ours[i] = clock(lambda: candidate(images))
            else:
                ours[i] = clock(lambda: candidate(images))
                theirs[i] = clock(lambda: dense(images))
    ratio = theirs / ours
    low, high = median_interval(ratio)
    return Latency(
        p50_ms=float(np.median(ours)),
        p95_ms=float(np.quantile(ours, 0.95)),
        dense_p50_ms=float(np.median(theirs)),
        speedup=float(np.median(ratio)),
        speedup_low=low,
        speedup_high=high,
        rounds=rounds,
        target=target_of(images, runtime),
    )


def target_of(images: Tensor, runtime: str = "eager") -> dict[str, Any]:
    """What a latency holds for: device, runtime, dtype, batch and, on a CPU, threads."""
    target: dict[str, Any] = {
        "device": device_name(images.device),
        "runtime": runtime,
        "dtype": str(images.dtype).removeprefix("torch."),
        "batch": images.shape[0],
    }
    if not images.is_cuda:
        target["threads"] = torch.get_num_threads()
    return target


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or "cpu"; "cuda" where this process has no GPU to name."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device.type
