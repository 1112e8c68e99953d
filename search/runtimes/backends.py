"""Runtimes whose latency is measured: PyTorch eager, compiled, as a CUDA graph, and onnxruntime.

A latency holds for its runtime only (`search.measure.latency.LatencyTarget`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto.methods import Code
from vitpareto.search.choices import RUNTIMES
from vitpareto.search.errors import UserError
from vitpareto.search.runtimes.exported_program import ClassifierGraph, trace_program, write_onnx

#: warm-up runs before a CUDA graph is recorded, as torch.cuda.graph requires
BEFORE_GRAPH = 3

Run = Callable[[Tensor], Any]


def check_runtime(runtime: str, device: str, dtype: str) -> None:
    """Raise UserError if the runtime is unknown or cannot run on this device in this dtype."""
    if runtime not in RUNTIMES:
        raise UserError.unknown(
            f"runtime {runtime!r} does not exist",
            runtime,
            RUNTIMES,
            key="runtime",
            got=runtime,
            accepted=tuple(RUNTIMES),
        )
    if runtime == "cudagraph" and not device.startswith("cuda"):
        raise UserError(
            f"device must be a CUDA device for runtime cudagraph (got {device})",
            Code.UNSUPPORTED, key="runtime", got=runtime, device=device,
        )  # fmt: skip
    if runtime == "onnxruntime":
        if dtype != "float32":
            raise UserError(
                f"dtype must be float32 for runtime onnxruntime (got {dtype})",
                Code.UNSUPPORTED, key="runtime", got=runtime, dtype=dtype,
            )  # fmt: skip
        if device.startswith("cuda") and "CUDAExecutionProvider" not in _providers():
            raise UserError(
                "onnxruntime must have a CUDA provider for a CUDA device (got "
                f"{', '.join(_providers())}): install onnxruntime-gpu, or measure on the CPU",
                Code.UNAVAILABLE, key="runtime", got=runtime, providers=tuple(_providers()),
            )  # fmt: skip


def runtime_call(model: nn.Module, images: Tensor, runtime: str) -> Run:
    """A call that runs the model in this runtime on batches of the shape of `images` [B, 3, H, W].

    Compiling, recording and exporting happen here or in the first calls, so warm it up. It uses as
    many threads as torch does. Raises UserError if the runtime cannot run here.
    """
    dtype = str(images.dtype).removeprefix("torch.")
    check_runtime(runtime, str(images.device), dtype)
    if runtime == "compiled":
        return compile_model(model)
    if runtime == "cudagraph":
        return _graph(model, images)
    if runtime == "onnxruntime":
        with tempfile.TemporaryDirectory(prefix="vitpareto-onnx-") as scratch:
            path = Path(scratch) / "model.onnx"
            # programs are exported on the CPU; the model is moved back afterwards
            deployed = ClassifierGraph(model, None).to("cpu")
            write_onnx(trace_program(deployed, images.detach().to("cpu")), path)
            model.to(images.device)
            return onnx_session(path, images.is_cuda)
    return model


def onnx_session(path: Path, cuda: bool = False, threads: int | None = None) -> Run:
    """A call that runs an ONNX file on a batch and returns its outputs as arrays.

    threads: threads per operator; as many as torch uses if None.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3
    # two sessions are timed in alternation; threads of the idle one would spin on the cores of the
    # other and cost it a third of its time at batch 1. Without any spinning both are 10 % slower
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        path, options, providers=["CUDAExecutionProvider" if cuda else "CPUExecutionProvider"]
    )
    (name,) = (i.name for i in session.get_inputs())

    def run(images: Tensor) -> Any:
        return session.run(None, {name: images.cpu().numpy()})

    return run


def _providers() -> list[str]:
    import onnxruntime

    found: list[str] = onnxruntime.get_available_providers()
    return found


def compile_model(model: nn.Module) -> Run:
    """The model, compiled by torch in its first calls for batches of their size."""
    # only one size is timed, so dynamic shapes would cost guards for nothing
    compiled: Run = torch.compile(model, dynamic=False)
    return compiled


def _graph(model: nn.Module, images: Tensor) -> Run:
    """A recorded CUDA graph; each call copies its batch in, replays and returns the same memory."""
    static_images = images.clone()
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(BEFORE_GRAPH):
            model(static_images)
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        out = model(static_images)

    def run(batch: Tensor) -> Any:
        static_images.copy_(batch)
        graph.replay()
        return out

    return run
