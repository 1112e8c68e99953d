"""The command as a user types it: every command once, every kind of bad input, nothing lost."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from vitpareto import cli
from vitpareto.clusters.connect import ClusterCapacity


class Said:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `vitpareto …` in this process, through its real entry point."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["vitpareto", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        code = exit_.value.code
        return Said(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module", autouse=True)
def _ray(room: ClusterCapacity) -> None:
    """One Ray for all commands of this file: `local_cluster` joins it."""


def test_search_front_trials_and_more(say, store: Path, cache: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("trials: 100\nimages: 40\nmethods: [topk, tome]\nlatency: off\n")
    where = ("--store", store, "--cache", cache)
    said = say("search", job, "--set", "trials=6", "--name", "s", "--workers", 2, *where)
    assert said.code == 0, said.err
    assert "6 trials measured" in said.err and "hypervolume" in said.err
    assert "front of s: digits on digits" in said.out and "topk keep_rate" in said.out
    assert (store / "s" / "front.png").stat().st_size > 10_000
    assert (store / "s" / "front.svg").read_text().startswith("<?xml")
    assert "MLflow" not in said.err

    # only the name: everything else stays as the study was started
    said = say("search", "--name", "s", "--trials", 8, *where)
    assert said.code == 0 and "8 trials measured" in said.err

    said = say("trials", "s", "--json", "--store", store)
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 8 and {r["state"] for r in rows} <= {"finished", "raced_out"}
    assert {"trial", "state", "recipe", "top1", "gmacs", "images", "reason"} <= set(rows[0])
    assert rows[0]["recipe"] == {} and all(0 < r["images"] <= 40 for r in rows)
    assert "8 trials of s" in say("trials", "s", "--store", store).out

    front = [json.loads(x) for x in say("front", "s", "--json", "--store", store).out.splitlines()]
    table = list(csv.DictReader(io.StringIO(say("front", "s", "--csv", "--store", store).out)))
    assert [int(r["trial"]) for r in table] == [r["trial"] for r in front]
    assert [r["gmacs"] for r in front] == sorted(r["gmacs"] for r in front)
    assert [r["top1"] for r in front] == sorted(r["top1"] for r in front)
    assert sum(r["knee"] for r in front) <= 1
    picture = tmp_path / "front.svg"
    assert say("front", "s", "--plot", picture, "--store", store).code == 0
    assert picture.stat().st_size > 10_000


def test_sync_export_and_verify(say, store: Path, tmp_path: Path, cache: Path) -> None:
    said = say("sync", "s", "--store", store)
    assert said.out == "0 runs created, 0 updated, 0 closed, 0 removed, 9 unchanged\n"
    out = tmp_path / "bundle"
    best = max(
        (json.loads(x) for x in say("front", "s", "--json", "--store", store).out.splitlines()),
        key=lambda r: r["certified_top1_low"],
    )
    reached = best["certified_top1_low"]
    said = say("export", "s", "--min-top1", reached, "--out", out, "--store", store)
    assert said.code == 0 and said.out == f"{out}\n" and f"trial {best['trial']} " in said.err
    said = say("verify", out)
    assert said.code == 0 and "verified: 20 images" in said.out

    said = say("export", "s", "--min-top1", 1, "--out", out, "--store", store)
    assert said.code == 2 and f"{out} exists already" in said.err
    said = say("export", "s", "--max-gmacs", 1e-6, "--out", tmp_path / "b", "--store", store)
    assert said.code == 2 and "nearest" in said.err and not (tmp_path / "b").exists()
    labels = json.loads((out / "labels.json").read_text())
    (out / "labels.json").write_text(json.dumps(labels[::-1]))
    said = say("verify", out)
    assert said.code == 2 and "labels.json has sha256" in said.err and "Traceback" not in said.err


def test_recover_gives_a_second_front(say, store: Path, cache: Path, tmp_path: Path) -> None:
    def rows() -> list[dict]:
        said = say("front", "s", "--json", "--store", store)
        return [json.loads(line) for line in said.out.splitlines()]

    first = rows()
    assert not any(r["recovered"] for r in first)
    where = ("--store", store, "--cache", cache)
    said = say("export", "s", "--recovered", "--knee", "--out", tmp_path / "b", "--store", store)
    assert said.code == 2 and "has no recovered trial: vitpareto recover s makes them" in said.err
    number = first[0]["trial"]
    said = say("recover", "s", "--epochs", 1, "--trial", number, "--lr", 1e-5, *where)
    assert said.code == 0, said.err
    assert "1 trials to recover" in said.err and f"trial {number} (" in said.err
    assert "front of s: digits" in said.out and "recovered front of s: digits" in said.out
    assert "epochs 1, soft distillation" in said.out
    both = rows()
    assert both[: len(first)] == first, "the front is as it was"
    (after,) = both[len(first) :]
    assert after["recovered"] and after["trial"] == number
    assert after["top1_before"] == first[0]["top1"]
    assert "recovered front" in (store / "s" / "front.svg").read_text()
    said = say("sync", "s", "--store", store)
    assert said.out == "0 runs created, 0 updated, 0 closed, 0 removed, 9 unchanged\n"
    said = say("recover", "s", "--epochs", 1, "--trial", number, *where)
    assert said.code == 0 and "0 trials to recover" in said.err
    said = say("recover", "s", "--epochs", 2, *where)
    assert said.code == 2 and "epochs was 1, now 2" in said.err


def test_a_profile_is_for_its_target(say, store: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    options = ("--batch", 2, "--points", 2, "--rounds", 1, "--out", out)
    said = say("profile", *options)
    assert said.code == 0 and said.out == f"{out}\n"
    assert "latencies of digits on device cpu, runtime eager, dtype float32, batch 2" in said.err
    search = ("search", "--store", store, "--cache", cache, "--name", "p", "--profile", out)
    said = say(*search, "--methods", "nvit", "--prepare-epochs", 1)
    assert said.code == 2 and "measured with batch 2 and not 1" in said.err
    said = say(*search, "--methods", "topk", "--latency-batch", 2)
    assert said.code == 2 and "only nvit and snap read" in said.err
    for option, value, expected in (
        ("--model", "digitz", "did you mean 'digits'"), ("--dtype", "float23", "'float32'"),
        ("--points", 1, "2 points or more"), ("--batch", 0, "--batch is 0"),
    ):  # fmt: skip
        said = say("profile", "--out", out, option, value)
        assert said.code == 2 and expected in said.err and "Traceback" not in said.err


def test_measure_takes_a_studys_trial_or_trained_weights(
    say, store: Path, cache: Path, tmp_path: Path
) -> None:
    place = ("--images", 20, "--cache", cache)
    row = json.loads(say("front", "s", "--json", "--store", store).out.splitlines()[0])
    said = say(
        "measure", "--study", "s", "--trial", row["trial"], "--json", *place, "--store", store
    )
    assert said.code == 0 and json.loads(said.out)["gmacs"] == pytest.approx(row["gmacs"], rel=1e-4)
    (weights,) = (store / "s" / "weights").iterdir()  # those of the recovered trial
    (tmp_path / "r.yaml").write_text(f"weights: {weights.stem}\n")
    recipe = ("measure", "--recipe", tmp_path / "r.yaml", *place)
    said = say(*recipe)
    assert said.code == 2 and f"names the weights {weights.stem}: give the file" in said.err
    assert say(*recipe, "--trained", weights).code == 0
    (tmp_path / "r.yaml").write_text("weights: 0123456789abcdef\n")
    said = say(*recipe, "--trained", weights)
    assert said.code == 2 and f"those given are {weights.stem}" in said.err
    for arguments in (("--study", "s"), ("--trial", 1), recipe[1:3] + ("--study", "s")):
        said = say("measure", *arguments, "--store", store)
        assert said.code == 2 and "Give --recipe FILE, or --study NAME with --trial N" in said.err


def test_ui_serves_the_study_until_it_is_ended(store: Path) -> None:
    command = [sys.executable, "-m", "vitpareto", "ui", "s", "--store", str(store)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            said = dict(served.stdout.readline().strip().split(": ", 1) for _ in range(3))
            assert list(said) == ["front", "explorer", "study"]
            assert all(address.startswith("http://127.0.0.1:") for address in said.values())
            assert "viewStateShareKey" in said["front"] and "explorer.html" in said["explorer"]
            page = said["study"]
            assert "/runs/" in page
            with urllib.request.urlopen(page, timeout=30) as answer:
                assert b"<title>MLflow" in answer.read()
        finally:
            served.terminate()
            assert served.wait(60) == 143
    with pytest.raises(OSError):
        urllib.request.urlopen(page, timeout=5)


def test_measure(say, cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("structure: {method: resize, size: 48}\ntokens: {method: tome, r: 2}\n")
    said = say("measure", "--recipe", recipe, "--images", 30, "--cache", cache, "--json")
    assert said.code == 0, said.err
    measured = json.loads(said.out)
    assert measured["images"] == 30 and measured["gmacs"] < 0.7 * measured["dense_gmacs"]
    text = say("measure", "--recipe", recipe, "--images", 30, "--cache", cache).out
    assert "resize size=48 tome r=2" in text and "speed-up" in text


def test_measure_refuses_fresh_weights(say, cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tokens: {method: patchmerger, prune_layers: [3], num_tokens: 20}\n")
    said = say("measure", "--recipe", recipe, "--images", 30, "--cache", cache, "--json")
    assert said.code == 2 and said.out == "" and "Traceback" not in said.err
    assert "methods.prune(model, 'patchmerger', weights=...)" in said.err


def test_a_demo_without_a_knee_exports_the_most_accurate(say, cache: Path, tmp_path: Path) -> None:
    said = say("demo", "--trials", 2, "--store", tmp_path, "--cache", cache)
    assert said.code == 0, said.err
    line = next(x for x in said.out.splitlines() if "no knee yet" in x)
    command = line.partition("More trials may give one: ")[2]
    assert command == f"vitpareto demo --trials 60 --store {tmp_path} --cache {cache}"
    assert "front of demo" in said.out
    (bundle,) = tmp_path.glob("demo/bundle*")
    assert f"the most accurate, to deploy: {bundle}/README.md" in said.out
    assert f"is trial {int(bundle.name.removeprefix('bundle-'))}." in line
    assert json.loads((bundle / "verification.json").read_text())


def test_show(say, store: Path, cache: Path, tmp_path: Path) -> None:
    from PIL import Image

    from vitpareto.search.data import embedded_images

    recipe, picture = tmp_path / "recipe.yaml", tmp_path / "patches.png"
    recipe.write_text("tokens: {method: rajni, gamma: 0.1, min_tokens: 8, budget: image}\n")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(files, embedded_images.draw("search")[0], strict=False):
        Image.fromarray(pixels).save(path)
    where = ("--cache", cache, "--out", picture)
    said = say("show", "--recipe", recipe, "--image", *files, "--json", *where)
    assert said.code == 0 and f"picture: {picture}" in said.err
    with Image.open(picture) as drawn:
        assert drawn.width > 1000
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:
        assert len(row["blocks"]) == 12 and row["pruned"]["name"] in embedded_images.CLASSES
        for block in row["blocks"]:
            assert block["patches"] == 64 - block["dropped"]
            assert set(block["figures"]) == {"rho", "eta", "keep_ratio"}

    # a trial of the study above, on its own images
    said = say("show", "--study", "s", "--trial", 1, "--images", 2, "--store", store, *where)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("digits search 0 (truth: ")

    picture.unlink()
    for arguments, expected in (
        ((), "Give --recipe FILE, or --study NAME with --trial N"),
        (("--study", "s"), "--trial N"),
        (("--study", "s", "--trial", 999, "--store", store), "study s has no trial 999"),
        (("--study", "s", "--trial", 1, "--model", "x", "--store", store), "leave them out"),
        (("--recipe", tmp_path / "no.yaml"), "no.yaml cannot be read"),
        (("--recipe", files[0]), "it is not UTF-8 text"),
        (("--recipe", recipe, "--image", recipe), "recipe.yaml cannot be read"),
        (("--recipe", recipe, "--model", "digit"), "did you mean 'digits'"),
    ):
        said = say("show", *arguments, *where)
        assert said.code == 2 and expected in said.err and "Traceback" not in said.err
    assert not picture.exists()
    said = say("show", "--recipe", recipe, "--out", tmp_path / "show.pdf")
    assert said.code == 2 and "accepted is FILE.png" in said.err


def test_methods_lists_what_is_registered(say) -> None:
    from vitpareto import methods

    text = say("methods").out
    rows = [json.loads(line) for line in say("methods", "--json").out.splitlines()]
    assert [r["name"] for r in rows] == list(methods.names())
    assert all(f"{name}: " in text for name in methods.names())
    assert "arxiv.org/abs/2210.09461" in say("methods", "tome").out


def test_table(say) -> None:
    said = say("table", "--methods", "topk,ats", "--rates", "0.5", "--batch", 2, "--rounds", 2)
    assert said.code == 0, said.err
    assert "digits, fresh weights" in said.out and "batch 2" in said.out
    assert "topk keep_rate=0.5 prune_layers=[3,6,9]" in said.out and "images decide" in said.out
    said = say("table", "--models", "vit_small_patch16_224", "--methods", "tram", "--rates", "0.75",
               "--rounds", 0, "--json")  # fmt: skip
    dense, tram = (json.loads(line) for line in said.out.splitlines())
    assert dense["gmacs"] == pytest.approx(4.608, abs=1e-3) and dense["images_per_s"] is None
    assert tram["published"] == "2.9964 thop (ours 2.99682)"
    said = say("table", "--methods", "topk", "--rounds", 0, "--csv")
    assert [r["rate"] for r in csv.DictReader(io.StringIO(said.out))] == ["", "0.75", "0.5"]
    for options, expected in (
        (("--rates", "half"), "--rates is 'half': accepted are numbers"),
        (("--rates", "0.5,2"), "rate is 2: accepted is a number, 0 < rate < 1"),
        (("--models", "digit"), "did you mean 'digits'"),
        (("--methods", "tomee"), "did you mean 'tome'"),
        (("--batch", "0"), "batch is 0"),
    ):
        said = say("table", *options)
        assert said.code == 2 and expected in said.err and "Traceback" not in said.err


def test_reproduce(say, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    said = say("reproduce", "--models", "vit_small_patch16_224")
    assert said.code == 0, said.err
    assert "2.9968" in said.out and "not run: no data" in said.out and "--data" in said.err
    said = say("reproduce", "--json")
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert len(rows) == 38 and not any(r["our_top1"] for r in rows)
    assert all(r["top1_why"].startswith("not run: ") for r in rows)

    from vitpareto.search.compare import published
    from vitpareto.search.compare.published import Row

    setting = {"keep_rate": 0.25, "prune_layers": [3, 6, 9]}
    claim = Row("topk", "digits", setting, "here", False, "own", top1=80.0, timm_tag="digits")
    monkeypatch.setattr(published, "rows", lambda: (claim,))
    said = say("reproduce", "--data", "digits", "--cache", cache, "--csv")
    (row,) = csv.DictReader(io.StringIO(said.out))
    assert row["images"] == "1000" and 50 < float(row["our_top1"]) < float(row["our_dense_top1"])
    assert f"digits {claim.label}: {float(row['our_top1']):.3f} %" in said.err
    where = ("--data", "digits", "--cache", cache, "--weights-dir", tmp_path)
    row = json.loads(say("reproduce", *where, "--json").out)
    assert row["our_top1"] is None and row["top1_why"].startswith("not run: no digits.safetensors")
    for options, expected in (
        (("--data", "/nowhere/val"), "no such folder: /nowhere/val"),
        (("--models", "digit"), "nothing is published of 'digit': did you mean 'digits'"),
    ):
        said = say("reproduce", *options)
        assert said.code == 2 and expected in said.err and "Traceback" not in said.err


COMMANDS = [c.name for c in cli.app.registered_commands]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(say, name: str) -> None:
    said = say(name, "--help")
    assert said.code == 0 and f"vitpareto {name}" in said.out.split("Usage", 1)[1].split("\n", 1)[1]


def test_version(say) -> None:
    assert say("--version").out.strip().count(".") == 2


BAD = {
    "unknown model": (("--model", "diet_small_patch16_224"), "did you mean 'deit_small"),
    "unsupported model": (("--model", "resnet18"), "ResNet cannot be pruned"),
    "unknown method": (("--methods", "topk,tomee"), "did you mean 'tome'"),
    "no epochs": (("--methods", "tnt"), "prepare_epochs is 0: give prepare_epochs"),
    "no profile": (("--methods", "nvit", "--prepare-epochs", "1", "--profile", "/nowhere.json"),
                   "latency table /nowhere.json cannot be read"),
    "unknown objective": (("--objectives", "top1,gmac"), "did you mean 'gmacs'"),
    "unknown sampler": (("--sampler", "tpee"), "did you mean 'tpe'"),
    "unknown key": (("--set", "trails=3"), "did you mean 'trials'"),
    "given twice": (("--trials", "3", "--set", "trials=4"), "3 by --trials, 4 by --set trials=4"),
    "out of range": (("--trials", "0"), "1 <= trials"),
    "parameter out of range": (("--set", "space.topk.keep_rate=[0.5,1.5]"), "keep_rate is 1.5"),
    "unknown parameter": (("--set", "fixed.tome.inflexion=0"), "did you mean 'inflection'"),
    "no such data": (("--data", "/nowhere/val"), "/nowhere/val"),
    "empty folder": (("--data", "EMPTY"), "EMPTY"),
    "classes differ": (("--data", "FOLDER"), "10 classes"),
    "unwritable store": (("--store", "FILE/studies"), "the store cannot be written"),
    "unreachable window": (("--max-gmacs", "0.000001"), "no recipe of"),
    "too many images": (("--images", "100000"), "400"),
    "missing weights": (("--weights", "/nowhere/w.safetensors"), "is not there"),
    "wrong weights": (("--weights", "WEIGHTS"), "wrong shape"),
    "missing job": (("nowhere.yaml",), "nowhere.yaml"),
    "no CUDA": (("--device", "cuda"), "no CUDA device"),
    "password": (("--tracking-uri", "https://me:secret@host"), "MLFLOW_TRACKING_PASSWORD"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_loses_nothing(
    say, case: str, tmp_path: Path, cache: Path
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
    save_file({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "WEIGHTS")
    (tmp_path / "WEIGHTS").rename(tmp_path / "WEIGHTS.safetensors")
    options, expected = BAD[case]
    places = {"EMPTY": "EMPTY", "FILE/studies": "FILE/studies", "FOLDER": "FOLDER",
              "WEIGHTS": "WEIGHTS.safetensors"}  # fmt: skip
    options = tuple(str(tmp_path / places[o]) if o in places else o for o in options)
    said = say("search", "--store", tmp_path / "studies", "--cache", cache, *options)
    assert said.code != 0
    assert expected in said.err, said.err
    assert "Traceback" not in said.err and "secret" not in said.err
    assert not list(tmp_path.glob("studies/*/trials/*")), "nothing may be measured"


def test_debug_shows_the_traceback(say, tmp_path: Path) -> None:
    said = say("front", "nosuch", "--store", tmp_path, "--debug")
    assert said.code != 0 and "Traceback" in said.err and "no study 'nosuch'" in said.err


def test_a_plot_of_another_kind_is_refused(say, store: Path) -> None:
    said = say("front", "s", "--plot", "front.pdf", "--store", store)
    assert said.code == 2 and "accepted is FILE.png or FILE.svg" in said.err
