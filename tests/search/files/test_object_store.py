"""Object stores behind fsspec's file systems; S3 itself is tested in tests/clusters."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from tests.logs import logged
from tests.refusals import refused
from vitpareto.methods import Code
from vitpareto.search.errors import UserError
from vitpareto.search.files import claims, object_store, write_through
from vitpareto.search.files.atomic import delete_file, delete_tree, write_atomic
from vitpareto.search.files.filesystems import (
    check_empty,
    download_folder,
    open_filesystem,
    storage_error,
    upload_folder,
)
from vitpareto.search.files.object_store import ObjectStore, store_folder
from vitpareto.search.files.write_through import fetch_if_missing, list_files, refresh


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store that pyarrow does not know: fsspec's scheme for local folders."""
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "first"))
    yield f"local://{tmp_path}/far"
    write_through._stores.clear()


@pytest.fixture
def study(url: str) -> Path:
    folder = store_folder(url) / "s"
    folder.mkdir(parents=True)
    return folder


def second_node(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study's folder on a node with another cache."""
    monkeypatch.setenv("VITPARETO_CACHE", str(tmp_path / "second"))
    return store_folder(url) / "s"


def test_a_plain_folder_is_its_own_store(tmp_path: Path) -> None:
    assert store_folder(str(tmp_path)) == tmp_path
    assert write_through.object_store_of(tmp_path / "a") is None
    assert not fetch_if_missing(tmp_path / "a") and not refresh(tmp_path / "a")


def test_writes_are_fetched_on_another_node(
    url: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomic(study / "trials" / "000001.json", "one")
    write_atomic(study / "epoch", "first")
    write_atomic(study / "lock.json", "local only")
    other = second_node(url, tmp_path, monkeypatch)
    assert other != study and not other.exists()
    found = list_files(other / "trials", "[0-9]*.json")
    assert [path.read_text() for path in found] == ["one"]
    assert not fetch_if_missing(other / "lock.json")
    for text in ("first", "second"):
        write_atomic(study / "epoch", text)
        assert refresh(other / "epoch") and (other / "epoch").read_text() == text
    assert ObjectStore(url).list_folders(other.parent) == ("s",)


def test_deletions_reach_the_store(url: str, study: Path) -> None:
    for name in ("a.json", "b/c.json", "b/d/e.json"):
        write_atomic(study / name, "x")
    delete_file(study / "a.json")
    delete_tree(study / "b")
    assert ObjectStore(url).list_files(study, recursive=True) == {}


def test_a_study_is_downloaded_without_its_large_files(
    url: str, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("study.json", "model.safetensors", "weights/a.safetensors", "trials/1.json"):
        write_atomic(study / name, name)
    other = second_node(url, tmp_path, monkeypatch)
    ObjectStore(url).download_tree(other)
    found = {p.relative_to(other).as_posix() for p in other.rglob("*") if p.is_file()}
    assert found == {"study.json", "trials/1.json"}
    assert fetch_if_missing(other / "weights/a.safetensors")


def test_only_changed_files_are_uploaded(
    url: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, uploaded = ObjectStore(url), []
    real = ObjectStore.upload

    def upload(self: ObjectStore, path: Path) -> None:
        uploaded.append(path.name)
        real(self, path)

    monkeypatch.setattr(ObjectStore, "upload", upload)
    for name in ("page.html", "optuna.journal", ".hidden"):
        (study / name).write_text("x")
    store.upload_tree(study)
    store.upload_tree(study)
    (study / "page.html").write_text("longer")
    store.upload_tree(study)
    assert uploaded == ["page.html", "page.html"]


@pytest.fixture
def short_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEW_INTERVAL_S", 0.05)
    monkeypatch.setattr(claims, "POLL_S", 0.05)
    monkeypatch.setattr(claims, "EXPIRES_S", 2.0)


@pytest.mark.usefixtures("short_claims")
def test_a_claim_is_exclusive_and_returned(url: str, study: Path) -> None:
    store = ObjectStore(url)
    with store.claim(study):
        with refused(Code.BUSY, UserError, study="s"), store.claim(study):
            pass
        # a claim that is being renewed may read as empty
        assert store.read(store.key(study / "claim.json")) is not None, "the holder keeps its claim"
    assert store.read(store.key(study / "claim.json")) is None


@pytest.mark.usefixtures("short_claims")
def test_a_claim_that_is_not_renewed_is_taken_over(
    url: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "EXPIRES_S", 0.3)
    store = ObjectStore(url)
    claims._write(store, store.key(study / "claim.json"), "killed")
    start = time.monotonic()
    with store.claim(study):
        assert time.monotonic() - start >= 0.3


def test_an_unavailable_storage_is_retried_and_a_refusal_is_not(
    url: str, study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_store, "RETRY_INTERVAL_S", 0.0)
    errors = [OSError("AWS Error NETWORK_CONNECTION"), OSError("AWS Error SLOW_DOWN")]
    real = object_store.write_file

    def write_file(system: fs.FileSystem, path: str, content: bytes) -> None:
        if errors:
            raise errors.pop()
        real(system, path, content)

    monkeypatch.setattr(object_store, "write_file", write_file)
    with caplog.at_level(logging.WARNING):
        write_atomic(study / "epoch", "kept")
    assert (Path(url.removeprefix("local://")) / "s" / "epoch").read_text() == "kept"
    assert len(logged(caplog, "object_store")) == 2, "one pause, one continuation"
    errors.append(OSError("AWS Error ACCESS_DENIED"))
    with refused(Code.UNWRITABLE, UserError, url=url):
        write_atomic(study / "epoch", "refused")


@pytest.mark.parametrize(
    ("message", "writing", "code"),
    [
        ("AWS Error NETWORK_CONNECTION during PutObject", True, Code.UNAVAILABLE),
        ("timed out", False, Code.UNAVAILABLE),
        ("no such bucket", True, Code.UNWRITABLE),
        ("no such bucket", False, Code.UNREADABLE),
    ],
)
def test_errors_tell_whether_trying_again_helps(message: str, writing: bool, code: Code) -> None:
    error = storage_error(OSError(message), "s3://bucket", writing=writing)
    assert error.code == code and error.details == {"url": "s3://bucket"}


def test_an_unknown_scheme_is_refused() -> None:
    with refused(Code.UNSUPPORTED, UserError, url="ftpx://a/b"):
        open_filesystem("ftpx://a/b")


def test_a_folder_is_copied_there_and_back(tmp_path: Path) -> None:
    source, target = tmp_path / "source", f"local://{tmp_path}/far"
    (source / "a").mkdir(parents=True)
    (source / "a" / "1").write_text("one")
    (source / "2").write_text("two")
    check_empty(target)
    upload_folder(source, target)
    with refused(Code.EXISTS, UserError, url=target):
        check_empty(target)
    copy = download_folder(target, tmp_path / "cache")
    assert (copy / "a/1").read_text() == "one" and (copy / "2").read_text() == "two"
    before = (copy / "2").stat()
    (source / "a" / "1").write_text("three")
    upload_folder(source, target)
    (tmp_path / "far" / "3").write_text("new")
    (copy / "gone").write_text("deleted at the source")
    assert download_folder(target, tmp_path / "cache") == copy
    assert (copy / "a/1").read_text() == "three" and (copy / "3").read_text() == "new"
    assert (copy / "2").stat() == before, "an equal file is not downloaded again"
    assert not (copy / "gone").exists()


def test_nothing_to_download(tmp_path: Path) -> None:
    url = f"local://{tmp_path}/none"
    with refused(Code.NOT_FOUND, UserError, url=url):
        download_folder(url, tmp_path / "cache")
