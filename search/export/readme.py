"""The README of a bundle: what it holds, and two programs that run it.

Text only. The tests run both programs as they stand in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitpareto.search.export.program_results import Int8Result, SpecialisedProgram

_SIZE = {
    "shorter": "w, h = (S, int(S * h / w)) if w <= h else (int(S * w / h), S)",
    "cover": "r = min(h / H, w / W)\nw, h = round(w / r), round(h / r)",
    "fit": "r = max(h / H, w / W)\nw, h = round(w / r), round(h / r)",
    "exact": "w, h = W, H",
}

_PAD = """\
fill = tuple(round(255 * v) for v in preprocess["mean"])
padded = Image.new("RGB", (max(w, width), max(h, height)), fill)
padded.paste(image, (max(0, (width - w) // 2), max(0, (height - h) // 2)))
image, (w, h) = padded, padded.size
"""

_LOAD = """\
preprocess = json.load(open("preprocess.json"))
labels = json.load(open("labels.json"))
image = Image.open(sys.argv[1] if len(sys.argv) > 1 else "example.png").convert("RGB")
w, h = image.size
{scale}
{size}
image = image.resize((w, h), Image.Resampling.{filter})
height, width = preprocess["size"]
{pad}left, top = round((w - width) / 2), round((h - height) / 2)
image = image.crop((left, top, left + width, top + height))
"""

_ONNX = """\
import json, sys
import numpy as np
import onnxruntime
from PIL import Image

{load}
pixels = np.asarray(image, dtype=np.float32) / 255
mean, std = (np.array(preprocess[k], dtype=np.float32) for k in ("mean", "std"))
images = ((pixels - mean) / std).transpose(2, 0, 1)[None]  # [B, 3, H, W]; any B

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits, score, label = session.run(["logits", "score", "class"], {{"images": images}})
print(labels[label[0]], f"{{score[0]:.4f}}")
"""

_TORCH = """\
import json, sys
import torch
from PIL import Image

{load}
pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
mean, std = (torch.tensor(preprocess[k]) for k in ("mean", "std"))
images = ((pixels.view(height, width, 3) - mean) / std).permute(2, 0, 1)[None].contiguous()

program = torch.export.load("model.pt2").module()
with torch.no_grad():
    logits, score, label = program(images)  # [B, 3, H, W]; any B
print(labels[label[0]], f"{{score[0]:.4f}}")
"""

_README = """\
# {model}, pruned: {recipe}

{facts}

The graph takes preprocessed images `images` [B, 3, H, W], float32, at any batch size, and gives
`logits` [B, {classes}], `score` [B] (the softmax's largest) and `class` [B] (int64, an index into
`labels.json`).

With onnxruntime, numpy and pillow:

```python
{onnx}```

With torch and pillow (`torch.export.load` unpickles: load only bundles you trust):

```python
{torch}```

Both take an image file as their argument; without one, `example.png`, the first verification image.

| file | what it is |
|---|---|
| `model.onnx` | the ONNX program, weights inside (above 1.5 GB: in `model.onnx.data`) |
| `model.pt2` | the torch.export program, for the CPU |
| `recipe.yaml`, `weights.safetensors` | the recipe, and the pruned model's state dict |
| `preprocess.json`, `labels.json` | preprocessing of an image; names of the classes |
| `result.json` | accuracy with its interval, cost, provenance, hash of every file |
| `verify.npz` | images and the measured model's logits, for `vitpareto verify` |
| `verification.json` | the result of `vitpareto verify` at the export |
"""


def more_programs(int8: Int8Result | None, programs: Sequence[SpecialisedProgram]) -> str:
    """The README's table of additional programs; empty if there are none."""
    rows = []
    if int8 is not None:
        rows.append(f"| `model.int8.onnx` | {int8.summary()}; it is run as `model.onnx` is |")
    for program in programs:
        verdict = "verified" if program.verified else "not verified"
        rows.append(f"| `{program.file}` | {verdict}: {program.why}; `{program.runs}` |")
    return "\n".join(["", "| more programs | |", "|---|---|", *rows, ""]) if rows else ""


def readme(model: str, recipe: str, facts: str, preprocess: dict[str, Any], classes: int) -> str:
    """The bundle's README.md; preprocess: content of `preprocess.json`."""
    rule = preprocess["resize"]
    scale = 'S = preprocess["scale_size"][0]' if rule == "shorter" else ""
    load = _LOAD.format(
        scale=scale or 'H, W = preprocess["scale_size"]',
        size=_SIZE[rule],
        filter=preprocess["interpolation"].upper(),
        pad=_PAD if preprocess["crop_mode"] == "border" else "",
    )
    return _README.format(
        model=model,
        recipe=recipe,
        facts=facts,
        classes=classes,
        onnx=_ONNX.format(load=load),
        torch=_TORCH.format(load=load),
    )


def programs(text: str) -> tuple[str, str]:
    """The two programs of a README: onnxruntime's and torch.export's."""
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    onnx, torch = blocks
    return onnx, torch
