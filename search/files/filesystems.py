"""File systems behind URLs (s3://, gs:// and the schemes of fsspec), and copying folders.

pyarrow reads and writes S3 and Google Cloud Storage itself. fsspec would need one more package for
each (s3fs, gcsfs), so it serves the other schemes. Credentials come from the environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import fsspec
from pyarrow import fs

from vitpareto.search.errors import Code, UserError
from vitpareto.search.files.locks import locked

#: files that are copied at a time
COPY_THREADS = 16
#: what pyarrow's messages contain when a server does not answer or is overloaded
TRANSIENT = (
    "NETWORK_CONNECTION", "SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "timed out",
)  # fmt: skip


def is_remote(store: str) -> bool:
    """Whether a store is a URL rather than a folder."""
    return "://" in store


def open_filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL, and the path in it.

    Raises UserError if the scheme is unknown or its package is not installed.
    """
    try:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if url.startswith("s3://") and "?" not in url and endpoint:
            # from_uri would ask Amazon for the bucket's region, whatever server holds it
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            s3 = fs.S3FileSystem(
                endpoint_override=endpoint,
                region=region or "us-east-1",
                allow_delayed_open=True,  # one request for a small file instead of three
            )
            return s3, url.removeprefix("s3://")
        system, path = fs.FileSystem.from_uri(url)
        return system, path
    except Exception as error:  # pyarrow raises several unrelated types
        try:
            other, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as unknown:
            raise UserError(
                f"{url} cannot be opened ({short(error)}; {unknown}): must be a folder, s3://, "
                "gs://, or a scheme of an installed fsspec package",
                Code.UNSUPPORTED,
                url=url,
            ) from error
        return fs.PyFileSystem(fs.FSSpecHandler(other)), path


def write_file(system: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a whole file. Its folder is created on file systems that have folders."""
    try:
        stream = system.open_output_stream(path)
    except FileNotFoundError:
        system.create_dir(str(PurePosixPath(path).parent))
        stream = system.open_output_stream(path)
    with stream as out:
        out.write(content)


def files_below(system: fs.FileSystem, path: str, *, recursive: bool) -> dict[str, fs.FileInfo]:
    """The files in a folder by their path relative to it; {} if the folder does not exist."""
    selector = fs.FileSelector(path, allow_not_found=True, recursive=recursive)
    return {
        str(PurePosixPath(info.path).relative_to(path)): info
        for info in system.get_file_info(selector)
        if info.type == fs.FileType.File
    }


def upload_folder(folder: Path, url: str) -> None:
    """Copy the files of a folder to a URL. Raises UserError if they cannot be written."""
    system, target = open_filesystem(url)
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def upload(path: Path) -> None:
        # not fs.copy_files for the whole folder: it stores an empty object for each subfolder
        name = path.relative_to(folder).as_posix()
        write_file(system, str(PurePosixPath(target) / name), path.read_bytes())

    try:
        with ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(upload, files))
    except OSError as error:
        raise storage_error(error, url, writing=True) from error


def check_empty(url: str) -> None:
    """Raise UserError if anything exists below a URL, or if it cannot be read."""
    system, path = open_filesystem(url)
    try:
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    except OSError as error:
        raise storage_error(error, url, writing=False) from error
    if found:
        raise UserError(f"{url} exists already: choose another URL", Code.EXISTS, url=url)


def download_folder(url: str, cache: Path) -> Path:
    """A local copy of a URL's files, in `cache`/objects; only what changed is downloaded.

    Raises UserError if the URL has no files or cannot be read.
    """
    system, source = open_filesystem(url)
    folder = cache / "objects" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        files = files_below(system, source, recursive=True)
        if not files:
            raise UserError(f"{url} does not exist or has no files", Code.NOT_FOUND, url=url)

        def download(name: str) -> None:
            path, info = folder / name, files[name]
            if path.is_file() and path.stat().st_size == info.size:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            # not fs.copy_files, which asks the server for each file's size once more
            with system.open_input_stream(info.path) as stored, open(partial, "wb") as local:
                shutil.copyfileobj(stored, local)
            partial.replace(path)

        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")), ThreadPoolExecutor(COPY_THREADS) as pool:
            list(pool.map(download, files))
            for path in [p for p in folder.rglob("*") if p.is_file()]:
                if path.relative_to(folder).as_posix() not in files:
                    path.unlink()  # deleted from the URL since the last download
    except OSError as error:
        raise storage_error(error, url, writing=False) from error
    return folder


def storage_error(error: OSError, url: str, *, writing: bool) -> UserError:
    """The UserError for a failed request. `Code.UNAVAILABLE` if trying again may help."""
    transient = any(word in str(error) for word in TRANSIENT)
    refused = Code.UNWRITABLE if writing else Code.UNREADABLE
    verb = "written" if writing else "read"
    return UserError(
        f"{url} cannot be {verb}: {short(error)}",
        Code.UNAVAILABLE if transient else refused,
        url=url,
    )


def short(error: BaseException) -> str:
    """An error's message on one line, at most 300 characters."""
    return " ".join(str(error).split())[:300]
