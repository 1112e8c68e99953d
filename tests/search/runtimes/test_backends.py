"""Runtimes and exported programs: what cannot run is refused, and programs keep their promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from tests.refusals import refused
from vitpareto.search.errors import UserError
from vitpareto.search.runtimes.backends import check_runtime, compile_model, onnx_session
from vitpareto.search.runtimes.exported_program import (
    OUTPUTS,
    ClassifierGraph,
    load_onnx,
    trace_program,
    write_onnx,
)


def classifier(head_indices: tuple[int, ...] | None = None) -> ClassifierGraph:
    """A linear model of images [B, 3, 4, 4] with 5 logits, as a program."""
    torch.manual_seed(0)
    return ClassifierGraph(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), head_indices)


def test_a_runtime_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("unknown-name", UserError, key="runtime", got="egaer"):
        check_runtime("egaer", "cpu", "float32")
    with refused("unsupported", UserError, got="cudagraph", device="cpu"):
        check_runtime("cudagraph", "cpu", "float32")
    with refused("unsupported", UserError, got="onnxruntime", dtype="bfloat16"):
        check_runtime("onnxruntime", "cpu", "bfloat16")
    cpu_only = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: cpu_only)
    with refused("unavailable", UserError, got="onnxruntime", providers=tuple(cpu_only)):
        check_runtime("onnxruntime", "cuda", "float32")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    check_runtime("onnxruntime", "cuda:1", "float32")
    check_runtime("cudagraph", "cuda", "bfloat16")


def test_a_program_for_one_batch_size_accepts_no_other() -> None:
    images = torch.randn(3, 3, 4, 4)
    model = classifier()
    program = trace_program(model, images, batch=1).module()
    torch.testing.assert_close(program(images[:1]), model(images[:1]))
    with pytest.raises(Exception, match="images"):
        program(images)
    any_size = trace_program(model, images[:1]).module()
    torch.testing.assert_close(any_size(images), model(images))


def test_an_onnx_file_gives_logits_score_and_class_of_the_datas_classes(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 4, 4)
    model = classifier((4, 1, 2))
    path = tmp_path / "model.onnx"
    write_onnx(trace_program(model, images), path)
    assert [output.name for output in load_onnx(path).graph.output] == list(OUTPUTS)
    found = onnx_session(path, threads=1)(images)
    logits = model.model(images)[:, [4, 1, 2]]
    for got, wanted in zip(found, (logits, *logits.softmax(1).max(1)), strict=True):
        np.testing.assert_allclose(got, wanted.detach().numpy(), atol=1e-6)


def test_a_compiled_model_is_compiled_for_the_sizes_that_it_sees() -> None:
    net = nn.Linear(3, 2)
    with torch.compiler.set_stance("force_eager"):
        x = torch.randn(4, 3)
        torch.testing.assert_close(compile_model(net)(x), net(x))
