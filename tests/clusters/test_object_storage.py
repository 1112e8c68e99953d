"""A store and images in object storage: a real server that speaks S3, on loopback."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from pyarrow import fs

from tests.clusters.running import Running, running
from tests.logs import logged
from tests.refusals import refused
from tests.search.faults import NAME, until
from vitpareto.methods.engine.preparation import SharedWeights
from vitpareto.search.data.datasets import open_data
from vitpareto.search.data.decoded import is_complete
from vitpareto.search.data.preprocess import Preprocess
from vitpareto.search.errors import UserError
from vitpareto.search.files import claims, write_through
from vitpareto.search.files.atomic import delete_tree, write_atomic
from vitpareto.search.files.filesystems import check_empty, upload_folder
from vitpareto.search.files.object_store import ObjectStore, store_folder
from vitpareto.search.models.weight_store import WeightStore
from vitpareto.search.study.folder import StudyFolder
from vitpareto.search.training.preparation_cache import prepare_once
from vitpareto.search.trials.local_images import local_split

pytestmark = pytest.mark.slow

JOB = {"name": NAME, "trials": 10, "images": 200, "latency": "off", "race": "off"}
BUCKET = "studies-of-ours"


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment that names an S3 server with one bucket."""
    from moto.server import ThreadedMotoServer

    made = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    try:
        host, port = made.get_host_and_port()
        environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-storage",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        system = fs.S3FileSystem(
            endpoint_override=environment["AWS_ENDPOINT_URL"], region="us-east-1",
            access_key="key", secret_key="secret-of-the-storage", allow_bucket_creation=True,
        )  # fmt: skip
        system.create_dir(BUCKET)
        yield environment
    finally:
        made.stop()


@pytest.fixture
def storage(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """An address of this test's own in it; this process's cache is the test's too."""
    for key, value in server.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "cache"))
    yield f"s3://{BUCKET}/{tmp_path.name}"
    write_through._stores.clear()


def test_writes_reach_object_storage_and_other_nodes(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written through here, brought on another node (another cache): what never changes once, what
    others may have changed anew.
    """
    here = store_folder(storage) / "s"
    here.mkdir(parents=True)
    write_atomic(here / "trials" / "000001.json", "one")
    write_atomic(here / "epoch", "first")
    write_atomic(here / "optuna.journal", "not for others")
    monkeypatch.setenv("VITPARETO_CACHE", str(here.parents[3] / "another"))
    there = store_folder(storage) / "s"
    assert there != here and not there.exists()
    found = write_through.list_files(there / "trials", "[0-9]*.json")
    assert [p.name for p in found] == ["000001.json"]
    assert write_through.refresh(there / "epoch") and (there / "epoch").read_text() == "first"
    write_atomic(here / "epoch", "second")
    assert write_through.refresh(there / "epoch") and (there / "epoch").read_text() == "second"
    assert not write_through.fetch_if_missing(there / "optuna.journal")
    assert not write_through.fetch_if_missing(there / "none")
    delete_tree(there / "trials")
    assert not ObjectStore(storage).list_files(there / "trials")


def test_a_study_in_object_storage_has_one_driver(
    storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is alive is respected; the claim of one that died is taken over."""
    monkeypatch.setattr("vitpareto.search.files.claims.RENEW_INTERVAL_S", 0.5)
    monkeypatch.setattr("vitpareto.search.files.claims.EXPIRES_S", 15.0)
    study = StudyFolder.open(storage, "s")
    study.create()
    monkeypatch.setenv("VITPARETO_CACHE", str(study.folder.parents[2] / "another"))
    other = StudyFolder.open(storage, "s")
    other.create()
    with (
        study.lock.hold(),
        refused("busy", study="s"),
        other.lock.hold(),
    ):
        pass
    assert not write_through.refresh(study.folder / "claim.json"), "given back"
    claims._write(ObjectStore(storage), f"{storage.removeprefix('s3://')}/s/claim.json", "killed")
    with other.lock.hold():
        assert other.lock.is_held
    with pytest.raises(UserError):
        StudyFolder.find(storage, "t")


def test_writes_wait_for_unavailable_object_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A result waits for it, as for a full disk; what it refuses is said at once."""
    from moto.server import ThreadedMotoServer

    first = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    first.start()
    host, port = first.get_host_and_port()
    named = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a",
             "AWS_SECRET_ACCESS_KEY": "b", "VITPARETO_CACHE": str(tmp_path)}  # fmt: skip
    for key, value in named.items():
        monkeypatch.setenv(key, value)
    try:
        with pytest.raises(UserError):
            write_atomic(store_folder("s3://no-such-bucket/x") / "s" / "epoch", "1")
        folder = store_folder("s3://the-bucket/x") / "s"
        fs.S3FileSystem(
            endpoint_override=named["AWS_ENDPOINT_URL"], region="us-east-1",
            allow_bucket_creation=True,
        ).create_dir("the-bucket")  # fmt: skip
        first.stop()
        # it keeps what the first one held: both are of this process
        later = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        waits = threading.Thread(
            target=lambda: (
                until(lambda: logged(caplog, "object_store"), "the pause"),
                later.start(),
            )
        )
        waits.start()
        write_atomic(folder / "epoch", "kept")
        waits.join()
        assert ObjectStore("s3://the-bucket/x").read("the-bucket/x/s/epoch") == b"kept"
        assert len(logged(caplog, "object_store")) == 2, "one pause, one continuation"
        later.stop()
    finally:
        write_through._stores.clear()


def pictures(folder: Path) -> Path:
    draws = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(20):
            pixels = draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02d}.png")
    return folder


def test_images_in_object_storage_equal_those_of_a_folder(storage: str, tmp_path: Path) -> None:
    """The same order and fingerprint; a node without them fetches and decodes for itself, and one
    whose images were changed is refused.
    """
    folder = pictures(tmp_path / "val")
    upload_folder(folder, f"{storage}/val")
    with refused("exists", url=f"{storage}/val"):
        check_empty(f"{storage}/val")
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    local = open_data(str(folder), preprocess, cache=tmp_path / "c0")
    far = open_data(f"{storage}/val", preprocess, cache=tmp_path / "c1")
    assert far.fingerprint == local.fingerprint and far.sizes == local.sizes
    split = far.split("search")
    assert np.array_equal(split.images, local.split("search").images)
    os.environ["VITPARETO_CACHE"] = str(tmp_path / "c2")  # the fixture puts it back
    own = local_split(split, far.only("search"))
    assert own.folder.is_relative_to(tmp_path / "c2") and is_complete(own)
    assert np.array_equal(own.images, split.images)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "a" / "00.png")
    for i in range(1, 20):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "a" / f"{i:02d}.png")
    upload_folder(folder, f"{storage}/val")
    os.environ["VITPARETO_CACHE"] = str(tmp_path / "c3")
    with refused("mismatch", split="search", accepted=split.fingerprint):
        local_split(split, far.only("search"))
    with refused("not-found", url=f"{storage}/vla"):
        open_data(f"{storage}/vla", preprocess, cache=tmp_path / "c1")


def test_another_node_finds_a_preparation(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared weights lie in the storage: the second node trains nothing."""

    def train(progress: Path, artifacts: WeightStore) -> SharedWeights:
        write_atomic(progress / "state.pt", "half way")
        return SharedWeights(artifacts.save({"w": torch.arange(3.0)}), 0.5)

    here = store_folder(storage)
    first = prepare_once(here, "tnt", {"a": 1}, train)
    assert first.fresh
    monkeypatch.setenv("VITPARETO_CACHE", str(here.parents[2] / "another"))
    there = store_folder(storage)
    found = prepare_once(there, "tnt", {"a": 1}, train)
    assert not found.fresh and found.outcome == first.outcome
    assert torch.equal(found.artifacts.load(found.outcome.digests[0])["w"], torch.arange(3.0))
    assert not write_through.refresh(found.folder / "progress" / "state.pt"), "gone there too"


def test_fsspec_schemes_are_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheme that pyarrow does not have: fsspec's own for this machine's folders."""
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "cache"))
    study = StudyFolder.open(f"local://{tmp_path}/far", "s")
    try:
        study.create()
        write_atomic(study.folder / "epoch", "first")
        assert (tmp_path / "far" / "s" / "epoch").read_text() == "first"
        (study.folder / "explorer.html").write_text("drawn")
        study.publish()
        assert (tmp_path / "far" / "s" / "explorer.html").read_text() == "drawn"
        assert study.store == f"local://{tmp_path}/far"
    finally:
        write_through._stores.clear()


def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    with refused("unsupported", url="ftpx://a/b"):
        check_empty("ftpx://a/b")


@pytest.mark.timeout(1200)
def test_a_study_in_object_storage_survives_a_lost_head(
    server: dict[str, str], storage: str, tmp_path: Path
) -> None:
    """A cluster is killed with all of its nodes and disks; on another one the same command goes on
    from the storage, and the front is exported into it. No secret is in what is kept.
    """
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    remote = ObjectStore(f"{storage}/studies")
    study = remote.root / NAME

    def submit(cluster: Running) -> str:
        code, said = cluster.run(
            "submit", "job.yaml", "--address", cluster.dashboard, "--store", remote.url,
            cwd=tmp_path,
        )  # fmt: skip
        assert code == 0, said
        return said.splitlines()[0]

    def stored() -> dict[str, bytes]:
        found = {n: remote.read(remote.key(study / "trials" / n)) for n in names()}
        return {name: content for name, content in found.items() if content is not None}

    def names() -> list[str]:
        return [n for n in remote.list_files(study / "trials") if n[0].isdigit()]

    place = [tmp_path / "first", tmp_path / "second"]
    for folder in place:
        folder.mkdir()
    with running(place[0], 1, environment=server) as cluster:
        job = submit(cluster)
        cluster.goes_on_until(job, lambda: len(names()) >= 4, "four trials")
        family = psutil.Process(cluster.process.pid).children(recursive=True)
        for process in (cluster.process, *family):
            process.send_signal(signal.SIGKILL)
        cluster.process.wait()
        psutil.wait_procs(family, timeout=30)
    seen = stored()
    assert 4 <= len(seen) < JOB["trials"]  # type: ignore[operator]
    with running(place[1], 2, environment=server) as cluster:
        job = submit(cluster)
        code, said = cluster.run(
            "logs", job, "--follow", "--address", cluster.dashboard, cwd=tmp_path
        )
        assert code == 0 and f"{JOB['trials']} trials measured" in said, said
        on_nodes = [
            cluster.folder(i) / "cache" / "stores" / remote.root.name / NAME for i in (0, 1)
        ]
        assert all((f / "model.safetensors").is_file() for f in on_nodes), "fetched by each node"
    after = stored()
    assert len(after) == JOB["trials"] and seen.items() <= after.items(), "none lost, none changed"
    folder = StudyFolder.find(remote.url, NAME)
    assert len({r.key for r in folder.trials.all()}) == len(folder.trials.all()), (
        "none measured twice"
    )
    assert len(folder.certification().results()) > 0, "certified on a node, read here"
    code, said = cluster.run(
        "export", NAME, "--trial", max(r.trial for r in folder.certification().results()),
        "--store", remote.url, "--out", f"{storage}/bundle", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, said
    bundle = remote.filesystem.get_file_info(
        fs.FileSelector(f"{storage.removeprefix('s3://')}/bundle", recursive=True)
    )
    assert {"model.onnx", "recipe.yaml", "verification.json"} <= {f.base_name for f in bundle}
    kept = [remote.read(remote.key(study / n)) for n in remote.list_files(study, recursive=True)]
    assert kept and not any(b"secret-of-the-storage" in (content or b"") for content in kept)
