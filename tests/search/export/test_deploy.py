"""Deploying a bundle: timed, in int8, packaged, in MLflow's registry and served from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from tests.refusals import refused
from vitpareto import methods
from vitpareto.clusters.connect import ClusterCapacity
from vitpareto.methods import Recipe
from vitpareto.search.choices import RUNTIMES
from vitpareto.search.errors import UserError
from vitpareto.search.export.benchmark import bench_bundle, dense_model
from vitpareto.search.export.bundle import ExtraPrograms, export
from vitpareto.search.export.preprocessing import normalised
from vitpareto.search.export.program_results import Int8Result
from vitpareto.search.export.reference_outputs import ReferenceOutputs
from vitpareto.search.export.specialised import write_static
from vitpareto.search.export.verification import check_files, verify
from vitpareto.search.measure.accuracy import batches_of
from vitpareto.search.models import embedded_model
from vitpareto.search.runtimes.backends import onnx_session, runtime_call
from vitpareto.search.runtimes.exported_program import ClassifierGraph
from vitpareto.search.study.certificates import measured
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.study.front import front_of
from vitpareto.search.study.job import SearchConfig
from vitpareto.search.study.objectives import objectives_named
from vitpareto.search.study.recorded_recipe import RecordedRecipe
from vitpareto.search.study.results import TrialResult
from vitpareto.search.study.rungs import OUTSIDE_BUDGETS
from vitpareto.search.tracking.client import open_client
from vitpareto.search.tracking.database import store_uri
from vitpareto.search.tracking.registry import aliases_of, fastest, register
from vitpareto.search.trials.job_check import check_job
from vitpareto.search.trials.measurement import limit_violation, measure_recipe
from vitpareto.search.trials.resources import TrialResources
from vitpareto.search.trials.run_study import run_study
from vitpareto.search.trials.study_task import study_task
from vitpareto.search.trials.worker import Worker

COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, capacity: ClusterCapacity
) -> StudyFolder:
    config = SearchConfig.of({
        "name": "s", "trials": 8, "images": 100, "methods": "topk,random", "latency": "off",
        "certify": "off", "store": str(tmp_path_factory.mktemp("store")), "cache": str(cache),
        "workers": 1, "device": "cpu", "fixed": {"structure": "none"},
    })  # fmt: skip
    folder = run_study(check_job(config), cpus=1, gpus=0).folder
    return folder


@pytest.fixture(scope="module")
def chosen(study: StudyFolder) -> TrialResult:
    """The front's cheapest."""
    return front_of(measured(study), objectives_named(("top1", "gmacs")))[0]


@pytest.fixture(scope="module")
def bundle(
    study: StudyFolder, chosen: TrialResult, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Path:
    return export(study, chosen, tmp_path_factory.mktemp("out") / "b", cache=str(cache), images=4)


@pytest.mark.slow
def test_the_description_of_a_version(
    study: StudyFolder, chosen: TrialResult, bundle: Path
) -> None:
    first = register(study, chosen, bundle)
    second = register(study, chosen, bundle, aliases=["champion"])
    assert first.name == "vitpareto-s" and (first.version, second.version) == ("1", "2")
    assert set(first.aliases) == {"champion", *aliases_of(study, chosen, recovered=False)}
    assert "fastest" in first.aliases and second.aliases == ("champion",)
    client = open_client(store_uri(study.folder.parent))
    assert client.get_model_version_by_alias("vitpareto-s", "champion").version == 2
    assert client.get_model_version_by_alias("vitpareto-s", "fastest").version == 1
    tags = client.get_model_version("vitpareto-s", "1").tags
    assert tags["trial"] == str(chosen.trial) and tags["verified"] == "true"
    assert tags["front"].startswith("1 of ") and "method:" in tags["recipe"]
    run_id = client.get_model_version("vitpareto-s", "1").run_id
    assert client.get_run(run_id).data.tags["trial"] == str(chosen.trial)
    files = {f.path.removeprefix("model/") for f in client.list_artifacts(run_id, "model")}
    assert {"MLmodel", "labels.json", "preprocess.json", "recipe.yaml"} <= files


@pytest.mark.slow
def test_an_unknown_alias_and_one_of_another_trial_are_refused(
    study: StudyFolder, chosen: TrialResult, bundle: Path
) -> None:
    with refused("unknown-name", UserError):
        register(study, chosen, bundle, aliases=["chmpion"])
    dense = next(r for r in measured(study) if r.is_reference)
    with refused("mismatch", UserError):
        register(study, dense, bundle, aliases=["fastest"])
    with refused("missing", UserError):
        register(study, chosen, bundle, uri="none")


def test_fastest_goes_by_latency_where_all_of_the_front_was_timed() -> None:
    def trial(n: int, **values: float) -> TrialResult:
        return TrialResult(n, "finished", RecordedRecipe(), str(n), values)

    front = [trial(1, gmacs=1.0, latency_ms=9.0), trial(2, gmacs=2.0, latency_ms=8.0)]
    found = fastest(front)
    assert found is not None and found.trial == 2
    found = fastest([*front, trial(3, gmacs=0.5)])
    assert found is not None and found.trial == 3
    assert fastest([]) is None


def elsewhere(place: Path) -> Path:
    """An environment with this one's packages and without this project: an editable install is
    found by a .pth file, and those of another environment's folder are not read.
    """
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", place], check=True)  # type: ignore[attr-defined]
    (site,) = place.glob("lib/python3*/site-packages")
    (site / "deps.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = place / "bin" / "python"
    # mlflow starts uvicorn by its name
    script = place / "bin" / "uvicorn"
    script.write_text(f"#!{python}\nfrom uvicorn.main import main\nmain()\n")
    script.chmod(0o755)
    command = [python, "-c", "import vitpareto"]
    found = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert "ModuleNotFoundError" in found.stderr, found.stderr
    return python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflow_serves_it_where_this_project_is_not(
    study: StudyFolder, chosen: TrialResult, bundle: Path, tmp_path: Path
) -> None:
    """An image in, class and score out, as the measured model had them."""
    made = register(study, chosen, bundle)
    python = elsewhere(tmp_path / "env")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-W", "ignore", "-m", "mlflow", "models", "serve", "-m", made.address,
               "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": made.uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    known = ReferenceOutputs.load(bundle / "verify.npz")
    preprocess = json.loads((bundle / "preprocess.json").read_text())
    images = normalised(known.images, preprocess).numpy()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        try:
            # the server answers or ends; how long it takes depends on the machine's load
            while True:
                try:
                    opener.open(f"http://127.0.0.1:{port}/ping", timeout=60).close()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.3)
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps({"inputs": {"images": images.tolist()}}).encode(),
                {"Content-Type": "application/json"},
            )
            with opener.open(asked, timeout=600) as answer:
                found = json.load(answer)["predictions"]
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
    assert np.abs(np.array(found["logits"]) - known.logits).max() < known.tolerance
    assert found["class"] == known.logits.argmax(axis=1).tolist()
    assert all(0 < score <= 1 for score in found["score"])


# ------------------------------------------------------------------------------ other programs


@pytest.fixture(scope="module")
def extended(
    study: StudyFolder, chosen: TrialResult, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> tuple[Path, list[str]]:
    """A bundle with everything in it, and what was said of that."""
    said: list[str] = []
    out = tmp_path_factory.mktemp("extended") / "b"
    made = export(
        study, chosen, out, cache=str(cache), images=5,
        extra=ExtraPrograms(int8=True, aoti=COMPILER, static_batch=2), log=said.append,
    )  # fmt: skip
    return made, said


@pytest.mark.slow
def test_int8_is_measured_on_all_search_images_before_it_is_called_verified(
    study: StudyFolder, extended: tuple[Path, list[str]], cache: Path
) -> None:
    bundle, said = extended
    found = check_files(bundle).int8
    config = study.job().config(cache=str(cache))
    prepared = check_job(config)
    images = [
        (x, y)
        for x, y in batches_of(
            prepared.data.split("search"), prepared.model.preprocess, batch=64, device="cpu",
            dtype=torch.float32,
        )
    ]  # fmt: skip
    program = onnx_session(bundle / "model.int8.onnx")
    right = sum(int((program(x)[0].argmax(1) == y.numpy()).sum()) for x, y in images)
    assert found is not None and found.images == 100 and found.top1 == pytest.approx(right)
    assert found.change == pytest.approx(found.top1 - found.float_top1)
    assert found.change_low <= found.change <= found.change_high
    assert found.verified == (found.change >= -1)
    assert found.megabytes < 0.5 * found.float_megabytes
    types = {n.op_type for n in onnx.load(bundle / "model.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types
    assert {t.target.runtime for t in found.latency.values()} == {"onnxruntime int8"}
    assert any(line.startswith("int8 ") and "dense int8" in line for line in said)


def test_an_int8_program_that_lost_too_much_is_not_verified() -> None:
    one = Int8Result(100, 64, 90.0, 91.5, 95.0, -1.5, -4.0, 1.0, 95, {}, {}, 1.0, 4.0)
    assert not one.verified and one.summary().startswith("int8 NOT VERIFIED: top-1 90.00 %")
    assert replace(one, change=-1.0).verified


@pytest.mark.slow
def test_packages_say_whether_they_were_run(extended: tuple[Path, list[str]]) -> None:
    bundle, said = extended
    packages = {p.file: p for p in check_files(bundle).packages}
    fixed = packages["model.b2.onnx"]
    assert fixed.verified and fixed.runs.startswith("trtexec --onnx=model.b2.onnx")
    assert fixed.runs.endswith("not verified")
    shape = onnx.load(bundle / "model.b2.onnx").graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [2, 3, 64, 64]
    assert "model.b2.onnx: verified" in "\n".join(said)
    text = (bundle / "README.md").read_text()
    assert "| `model.int8.onnx` | int8 " in text and "| `model.b2.onnx` | verified: run" in text
    assert verify(bundle).verified


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler: AOTInductor compiles with one")
def test_an_aotinductor_package_runs_as_the_measured_model(
    extended: tuple[Path, list[str]],
) -> None:
    packages = {p.file: p for p in check_files(extended[0]).packages}
    assert packages["model.aoti.pt2"].verified, packages


@pytest.mark.slow
def test_a_package_that_is_another_model_is_not_verified(bundle: Path, tmp_path: Path) -> None:
    """Its weights are not those that were measured."""
    result = check_files(bundle)
    measured = ReferenceOutputs.load(bundle / "verify.npz")
    preprocess = json.loads((bundle / "preprocess.json").read_text())
    images = normalised(measured.images, preprocess)
    other = ClassifierGraph(dense_model(result), None)
    found = write_static(other, images, measured, tmp_path, 2)
    assert not found.verified and "4 wrong" in found.why


# ------------------------------------------------------------------------------------- timing


@pytest.mark.slow
def test_a_bundle_is_timed_beside_the_dense_models_programs(bundle: Path) -> None:
    reported = []
    found = bench_bundle(bundle, batches=(1, 3), rounds=6, on_result=reported.append)
    assert [(t.runtime, t.batch) for t in found] == [
        ("onnxruntime", 1), ("onnxruntime", 3), ("torch.export", 1), ("torch.export", 3),
    ]  # fmt: skip
    result = check_files(bundle)
    for timed in found:
        assert timed.macs_ratio == result.dense["gmacs"] / result.cost["gmacs"]
        assert timed.latency.target.runtime == timed.runtime
        assert timed.latency.target.batch == timed.batch and timed.latency.rounds == 6
        assert timed.efficiency == timed.latency.speedup / timed.macs_ratio
        assert timed.latency.speedup_low <= timed.latency.speedup <= timed.latency.speedup_high
    assert reported == found


@pytest.mark.slow
def test_an_unknown_runtime_and_an_empty_batch_are_refused(bundle: Path) -> None:
    with refused("unknown-name", UserError, got="onnxruntme"):
        bench_bundle(bundle, runtimes=["onnxruntme"])
    with refused("out-of-range", UserError, key="batches", got=[0]):
        bench_bundle(bundle, batches=[0])
    with refused("not-found", UserError, path=str(bundle.parent)):
        bench_bundle(bundle.parent)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model with three of its twelve blocks, which compile four times as long."""
    build = embedded_model.build

    def three_blocks(pretrained: bool = True) -> VisionTransformer:
        model = build(pretrained)
        model.blocks = model.blocks[:3]
        return model

    monkeypatch.setattr(embedded_model, "build", three_blocks)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_gives_the_models_logits(runtime: str) -> None:
    model = methods.prune(embedded_model.build(), "topk", keep_rate=0.6, prune_layers=(1, 2))
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if runtime == "cudagraph" and not torch.cuda.is_available():
        with refused("unsupported", UserError, got="cudagraph", device="cpu"):
            runtime_call(model, images, runtime)
        pytest.skip("needs a CUDA device: the graph itself")
    if runtime == "cudagraph":
        model, images = model.cuda(), images.cuda()
    with torch.inference_mode():
        wanted = model(images)
        found = runtime_call(model, images, runtime)(images)
    if runtime == "onnxruntime":
        found = torch.from_numpy(found[0])
    torch.testing.assert_close(found.cpu(), wanted.cpu(), atol=1e-4, rtol=1e-4)


def test_a_runtime_that_cannot_run_here_is_refused_before_the_search(
    tmp_path: Path, cache: Path
) -> None:
    job = {"store": str(tmp_path), "cache": str(cache), "device": "cpu", "images": 20}
    cuda = {"latency_runtime": "cudagraph"}
    with refused("unsupported", UserError, got="cudagraph", device="cpu"):
        check_job(SearchConfig.of({**job, **cuda}))
    half = {"latency_runtime": "onnxruntime", "dtype": "bfloat16"}
    with refused("unsupported", UserError, got="onnxruntime", dtype="bfloat16"):
        check_job(SearchConfig.of({**job, **half}))
    with refused("out-of-range", UserError, key="latency_runtime", closest="eager"):
        SearchConfig.of({**job, "latency_runtime": "egaer"})
    with refused("out-of-range", UserError, key="max_latency_ms", got=0):
        SearchConfig.of({**job, "max_latency_ms": 0})
    assert not list(tmp_path.glob("*/trials/*"))


@pytest.mark.usefixtures("shallow")
def test_a_trial_above_the_limit_of_latency_is_outside_and_not_measured(
    tmp_path: Path, cache: Path
) -> None:
    """At the batch and in the runtime it was named for; the dense model is the reference."""
    config = SearchConfig.of({
        "name": "limit", "images": 20, "methods": "topk", "latency_batch": 4, "device": "cpu",
        "latency_runtime": "onnxruntime", "max_latency_ms": 1e-3, "fixed": {"structure": "none"},
        "store": str(tmp_path), "cache": str(cache),
    })  # fmt: skip
    prepared = check_job(config)
    assert prepared.identity["latency_runtime"] == "onnxruntime"
    assert prepared.identity["max_latency_ms"] == 1e-3
    assert TrialResources.of(config, "cpu", 2, 0).workers == 1, "timed alone on its device"
    task = study_task(prepared, threads=1)
    worker = Worker.open(task)
    recipe = Recipe.of("topk", keep_rate=0.5, prune_layers=(2,))
    above = measure_recipe(worker, 1, recipe)
    assert (above.state, above.reason, above.images) == ("failed", OUTSIDE_BUDGETS, 0)
    assert limit_violation(above, task) == above.values["latency_ms"] / 1e-3 - 1 > 0
    dense = measure_recipe(worker, 0, Recipe())
    assert dense.state == "finished" and dense.images == 20 and dense.latency is not None
    assert dense.latency.target.runtime == "onnxruntime" and dense.latency.target.batch == 4
    wide = replace(worker, task=replace(task, latency=replace(task.latency, limit_ms=1e6)))
    assert measure_recipe(wide, 1, recipe).state == "finished"
