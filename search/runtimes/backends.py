"""What runs a model when its latency is measured: PyTorch as it comes, compiled, as a CUDA graph,
or onnxruntime on the exported program. A latency holds for its runtime alone (`cost.latency`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpareto.methods.engine.errors import nearest
from vitpareto.search.choices import RUNTIMES
from vitpareto.search.errors import UserError
from vitpareto.search.runtimes.exported_program import ClassifierGraph, trace_program, write_onnx

#: runs of a model before its CUDA graph is recorded, as torch.cuda.graph asks for
BEFORE_GRAPH = 3

Run = Callable[[Tensor], Any]


def check_runtime(runtime: str, device: str, dtype: str) -> None:
    """UserError where it is none, or cannot run on this device in this dtype."""
    if runtime not in RUNTIMES:
        raise UserError(f"runtime is {runtime!r}{nearest(runtime, RUNTIMES)}")
    if runtime == "cudagraph" and not device.startswith("cuda"):
        raise UserError(f"a CUDA graph needs a CUDA device; the device is {device}")
    if runtime == "onnxruntime":
        if dtype != "float32":
            raise UserError(f"programs are exported in float32, and the dtype is {dtype}")
        if device.startswith("cuda") and "CUDAExecutionProvider" not in _providers():
            raise UserError(
                "onnxruntime has no CUDA provider here (it has "
                f"{', '.join(_providers())}): install onnxruntime-gpu, or measure on the CPU"
            )


def prepare_runtime(model: nn.Module, images: Tensor, runtime: str) -> Run:
    """The model as this runtime runs it on batches like `images` [B, 3, H, W]; it takes such a
    batch and gives what the runtime gives. Compiling, recording or exporting happens here or in the
    first calls: warm it up. Threads are torch's.

    UserError where the runtime cannot run here (`check_runtime`).
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
            # a program is made on the CPU; the model then goes back to where it was
            deployed = ClassifierGraph(model, None).to("cpu")
            write_onnx(trace_program(deployed, images.detach().to("cpu")), path)
            model.to(images.device)
            return onnx_session(path, images.is_cuda)
    return model


def onnx_session(path: Path, cuda: bool = False, threads: int | None = None) -> Run:
    """An ONNX file as a call on a batch; it gives the program's outputs as arrays.

    threads: of one operator (None: torch's).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3
    # two sessions are timed in turn, and the threads of the one that waits would spin on the cores
    # of the one that runs: at batch 1 a third of its time went there. They spin within a run alone;
    # not at all is slower by a tenth, dense and pruned
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
    """The model compiled by torch in its first calls, for batches of their size."""
    # one size alone is timed: nothing is to be guarded for others
    made: Run = torch.compile(model, dynamic=False)
    return made


def _graph(model: nn.Module, images: Tensor) -> Run:
    """One recorded graph; a call copies its batch in, replays, and gives the same memory again."""
    held = images.clone()
    stream = torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(BEFORE_GRAPH):
            model(held)
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        out = model(held)

    def run(given: Tensor) -> Any:
        held.copy_(given)
        graph.replay()
        return out

    return run
