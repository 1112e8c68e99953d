"""`vitpareto search`: a study is made and continued, and bad input measures nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import STUDY, TRIALS, MadeStudy, Run
from vitpareto.methods.engine.bad_input import Code

pytestmark = pytest.mark.usefixtures("capacity")  # one Ray for the file: `local_cluster` joins it


def test_a_search_prints_its_front(made_study: MadeStudy) -> None:
    result, folder = made_study.result, made_study.store / STUDY
    assert f"{TRIALS} trials measured" in result.err and "hypervolume" in result.err
    assert "front of s: digits on digits" in result.out and "topk keep_rate" in result.out
    assert (folder / "front.png").stat().st_size > 10_000
    assert (folder / "front.svg").read_text().startswith("<?xml")
    assert "MLflow" not in result.err


def test_a_search_continues_by_its_name_alone(command: Run, own_store: Path, cache: Path) -> None:
    """Keys that are not given stay as the study was started."""
    result = command("search", "--name", STUDY, "--trials", TRIALS + 2, "--store", own_store,
                     "--cache", cache)  # fmt: skip
    assert result.code == 0 and f"{TRIALS + 2} trials measured" in result.err
    rows = command("trials", STUDY, "--json", "--store", own_store).rows
    assert len(rows) == TRIALS + 2 and all(row["images"] <= 40 for row in rows)


#: bad options, the code of the refusal, and what the message names
BAD: dict[str, tuple[tuple[str, ...], Code, str]] = {
    "unknown model": (("--model", "diet_small_patch16_224"), Code.UNKNOWN_NAME, "'deit_small"),
    "unsupported model": (("--model", "resnet18"), Code.UNSUPPORTED, "ResNet"),
    "unknown method": (("--methods", "topk,tomee"), Code.UNKNOWN_NAME, "'tome'"),
    "no epochs": (("--methods", "tnt"), Code.MISSING, "prepare_epochs"),
    "no profile": (("--methods", "nvit", "--prepare-epochs", "1", "--profile", "/nowhere.json"),
                   Code.UNREADABLE, "/nowhere.json"),
    "unknown objective": (("--objectives", "top1,gmac"), Code.UNKNOWN_NAME, "'gmacs'"),
    "unknown sampler": (("--sampler", "tpee"), Code.OUT_OF_RANGE, "'tpe'"),
    "unknown key": (("--set", "trails=3"), Code.UNKNOWN_NAME, "'trials'"),
    "given twice": (("--trials", "3", "--set", "trials=4"), Code.CONFLICT, "trials=4"),
    "out of range": (("--trials", "0"), Code.OUT_OF_RANGE, "from 1 to"),
    "parameter out of range": (("--set", "space.topk.keep_rate=[0.5,1.5]"), Code.OUT_OF_RANGE,
                               "1.5"),
    "unknown parameter": (("--set", "fixed.tome.inflexion=0"), Code.UNKNOWN_NAME, "'inflection'"),
    "no such data": (("--data", "/nowhere/val"), Code.NOT_FOUND, "/nowhere/val"),
    "empty folder": (("--data", "EMPTY"), Code.EMPTY, "EMPTY"),
    "classes differ": (("--data", "FOLDER"), Code.MISMATCH, "10"),
    "unwritable store": (("--store", "FILE/studies"), Code.UNWRITABLE, "FILE"),
    "unreachable window": (("--max-gmacs", "0.000001"), Code.EMPTY, "1e-06"),
    "too many images": (("--images", "100000"), Code.OUT_OF_RANGE, "400"),
    "missing weights": (("--weights", "/nowhere/w.pth"), Code.NOT_FOUND, "/nowhere/w.pth"),
    "wrong weights": (("--weights", "WEIGHTS"), Code.MISMATCH, "WEIGHTS.safetensors"),
    "missing job": (("nowhere.yaml",), Code.NOT_FOUND, "nowhere.yaml"),
    "no CUDA": (("--device", "cuda"), Code.UNAVAILABLE, "CUDA"),
    "password": (("--tracking-uri", "https://me:hidden@host"), Code.SECRET,
                 "MLFLOW_TRACKING_PASSWORD"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_measures_nothing(
    command: Run, case: str, tmp_path: Path, cache: Path
) -> None:
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("")
    for label in ("cat", "dog", "emu"):
        (tmp_path / "FOLDER" / label).mkdir(parents=True)
        for i in range(20):
            path = tmp_path / "FOLDER" / label / f"{i}.png"
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    save_file({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "WEIGHTS.safetensors")
    options, code, fragment = BAD[case]
    paths = {"EMPTY": "EMPTY", "FILE/studies": "FILE/studies", "FOLDER": "FOLDER",
             "WEIGHTS": "WEIGHTS.safetensors"}  # fmt: skip
    options = tuple(str(tmp_path / paths[o]) if o in paths else o for o in options)
    result = command("search", "--store", tmp_path / "studies", "--cache", cache, *options)
    assert fragment in str(result.is_refused(code))
    assert "hidden" not in result.err
    assert not list(tmp_path.glob("studies/*/trials/*")), "nothing may be measured"
