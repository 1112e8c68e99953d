"""Programs of a model that run without this project: torch.export, and ONNX converted from it.

A program returns logits, score and class, for any batch size, in float32 on the CPU.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

if TYPE_CHECKING:
    import onnx

#: names of the program's input and outputs, in order
INPUT, OUTPUTS = "images", ("logits", "score", "class")


class ClassifierGraph(nn.Module):
    """The exported module: images [B, 3, H, W] -> logits [B, K], score [B] and class [B].

    Logits are float32, of the data's classes; score is the largest softmax output, class is int64.
    """

    def __init__(self, model: nn.Module, head_indices: tuple[int, ...] | None):
        super().__init__()
        self.model = model
        index = None if head_indices is None else torch.tensor(head_indices)
        self.register_buffer("head_indices", index, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(images).float()
        if self.head_indices is not None:
            logits = logits.index_select(1, cast(Tensor, self.head_indices))
        score, label = logits.softmax(dim=1).max(dim=1)
        return logits, score, label


def trace_program(
    deployed: ClassifierGraph, images: Tensor, batch: int | None = None
) -> ExportedProgram:
    """The torch.export program.

    Args:
        images: example images [M >= 1, 3, H, W].
        batch: the only batch size that the program accepts; any size if None.
    """
    # two images, because torch.export treats a batch of one as a constant
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    if batch is not None:
        example = images[:1].repeat(batch, 1, 1, 1)
        shapes = {"images": {}}
    with torch.no_grad():
        return torch.export.export(deployed.eval(), (example,), dynamic_shapes=shapes)


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write the program as ONNX and run ONNX's checker on it."""
    import onnx

    with torch.no_grad():
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT], output_names=list(OUTPUTS)
        )
    assert exported is not None
    exported.save(str(path))
    onnx.checker.check_model(str(path))


def load_onnx(path: Path) -> onnx.ModelProto:
    """The ONNX model in a file."""
    import onnx

    return onnx.load(path)


def write_programs(deployed: ClassifierGraph, images: Tensor, bundle: Path) -> dict[str, float]:
    """Write model.pt2 and model.onnx, for any batch size. Returns the seconds that each took.

    images: example images [M >= 1, 3, H, W].
    """
    begin = time.monotonic()
    program = trace_program(deployed, images)
    torch.export.save(program, bundle / "model.pt2")
    middle = time.monotonic()
    write_onnx(program, bundle / "model.onnx")
    end = time.monotonic()
    return {"pt2": round(middle - begin, 2), "onnx": round(end - middle, 2)}
