"""Fingerprints, cache folders and stored files are those of the version before: an existing cache
is reused and an existing study continues.

The recorded values were computed by this file's `observe` with the code of that version.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECORDED = Path(__file__).with_name("recorded_keys.json")
#: a decoded split's fingerprint covers them: the recorded ones are put in their place
VERSIONS = ("1.0.31", "0.29.2", "13.0.0")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_folder(root: Path) -> Path:
    """val/ and train/ with two classes of PPM files: bytes that no library's version changes."""
    draw = np.random.default_rng(5)
    for split, count in (("val", 9), ("train", 4)):
        for name in ("ant", "cat"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (12, 10, 3), dtype=np.uint8).tobytes()
                (root / split / name / f"{i:02}.ppm").write_bytes(b"P6\n10 12\n255\n" + pixels)
    return root


def write_fashion(root: Path) -> Path:
    """Fashion-MNIST's four files with a few images: gzipped, the time stamp fixed."""
    root.mkdir(parents=True)
    draw = np.random.default_rng(6)
    for part, count in (("train", 20), ("t10k", 30)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            magic = bytes((0, 0, 8, values.ndim))
            header = magic + struct.pack(f">{values.ndim}I", *values.shape)
            packed = gzip.compress(header + values.tobytes(), mtime=0)
            (root / f"{part}-{kind}-ubyte.gz").write_bytes(packed)
    return root


def observe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All values that must not change, in JSON's types."""
    from vitpareto.methods.engine.weights import weights_digest
    from vitpareto.search.data import decoding, embedded_images
    from vitpareto.search.data.datasets import open_data
    from vitpareto.search.data.preprocess import Preprocess
    from vitpareto.search.files.object_store import ObjectStore
    from vitpareto.search.models import embedded_model
    from vitpareto.search.models.loading import fingerprint

    monkeypatch.setattr(
        decoding, "package_versions", lambda *names: dict(zip(names, VERSIONS, strict=True))
    )
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "cache"))
    cache = tmp_path / "cache"
    folder = write_folder(tmp_path / "pets")
    fashion = write_fashion(tmp_path / "fashion")
    plain = Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3, "bicubic", 0.9, "center")
    border = Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, "border")
    opened = {
        "folder": open_data(str(folder), plain, cache=cache),
        "folder, seed 1, border": open_data(str(folder), border, cache=cache, seed=1),
        "folder, 2 images": open_data(str(folder), plain, cache=cache, images=2),
        "fashionmnist": open_data(f"fashionmnist:{fashion}", plain, cache=cache),
        "digits": open_data(
            "digits", Preprocess.of(embedded_model.build()), cache=cache, images=50
        ),
    }
    found: dict[str, Any] = {}
    for name, data in opened.items():
        split = data.split("search")
        found[name] = {
            "fingerprint": data.fingerprint,
            "sizes": data.sizes,
            "splits": {s: data._listed[s].stamp() for s in data.sizes},
            "decoded": split.folder.relative_to(cache).as_posix(),
            "pixels": sha256(np.asarray(split.images).tobytes()) if name == "digits" else None,
            "labels": split.labels.tolist(),
            "index": json.loads((split.folder / "index.json").read_text()),
        }
    (folder / "val/ant/00.ppm").write_bytes(b"P6\n10 12\n255\n")
    corrupt = open_data(str(folder), plain, cache=cache)
    monkeypatch.setattr(
        f"{type(corrupt).__module__.replace('datasets', 'decoding')}.CORRUPT_LIMIT", 1
    )
    found["a corrupt image"] = [
        json.loads((corrupt.split(s).folder / "index.json").read_text())["fingerprint"]
        for s in corrupt.sizes
    ]
    found["drawings"] = {
        f"{split} {epoch}": [
            sha256(array.tobytes()) for array in embedded_images.draw(split, epoch)
        ]
        for split, epoch in (("train", 0), ("train", 3), ("search", 0), ("held-out", 0))
    }
    model = embedded_model.build()
    found["model"] = [fingerprint(model), weights_digest(model.state_dict())]
    found["object store"] = ObjectStore("s3://bucket/studies").root.name
    return found


def test_keys_are_those_of_the_version_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = json.loads(RECORDED.read_text())
    found = json.loads(json.dumps(observe(tmp_path, monkeypatch)))
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        assert found[name] == values, name
