"""The worked example of methods/README.md runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from vitpareto import methods

README = Path(methods.__file__).with_name("README.md").read_text(encoding="utf-8")

USE = """
import runpy, sys
import torch
from timm.models.vision_transformer import VisionTransformer
from vitpareto import methods

runpy.run_path(sys.argv[1])
assert "norm" in methods.names()
model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2).eval()
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    logits, trace = methods.prune(model, "norm", keep_rate=0.5)(images, trace=True)
    same = methods.prune(model, "norm", **methods.get("norm").identity)(images)
    assert torch.equal(same, model(images))
print([t.tolist() for t in trace.tokens])
"""


def test_the_worked_example_is_a_method(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (example,) = [block for block in blocks if "@register" in block]
    file = tmp_path / "norm.py"
    file.write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USE, str(file)],
        capture_output=True, text=True, check=False, cwd=Path(methods.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[17, 17], [9, 9], [5, 5], [3, 3]]"
    assert "norm" not in methods.names()


def test_every_file_that_is_not_a_method_is_in_the_table():
    named = set(re.findall(r"`(\w+)\.py`", README))
    for path in Path(methods.__file__).parent.rglob("*.py"):
        if path.stem != "__init__" and "@register" not in path.read_text(encoding="utf-8"):
            assert path.stem in named
