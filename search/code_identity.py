"""Which code this is: where the installed package lies, a fingerprint of it, and copies of it.

Every process of a search must run the driver's code. This module uses the standard library alone
and imports nothing of the project, so that it can be sent by value to a process that may have
another version installed, or none.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

#: the import name
PACKAGE = "vitpareto"
#: its sub-packages, which an editable install keeps beside the root package
SUBPACKAGES = ("methods", "search", "clusters", "dashboards")
#: the files that decide numbers: code, and the weights of the embedded model
DECISIVE = (".py", ".safetensors")
#: files of a checkout that no installed package has
LEFT_OUT = ("__pycache__", "*.png", "*.ipynb")


def package_folders() -> dict[str, Path]:
    """Folder of the root package under "" and of each sub-package under its name.

    Raises:
        ModuleNotFoundError: the package, or a part of it, is not installed here.
    """
    folders = {}
    for name in ("", *SUBPACKAGES):
        full = f"{PACKAGE}.{name}" if name else PACKAGE
        found = importlib.util.find_spec(full)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"{full} is not installed", name=full)
        folders[name] = Path(found.origin).parent
    return folders


def code_files() -> Iterator[tuple[str, Path]]:
    """(path within the package, file) of every file that decides numbers, in order of the paths."""
    found: dict[str, Path] = {}
    for name, folder in package_folders().items():
        for file in folder.rglob("*"):
            below = file.relative_to(folder)
            if file.suffix not in DECISIVE or "__pycache__" in below.parts:
                continue
            if not name and below.parts[0] in SUBPACKAGES:  # a sub-package, which has its own turn
                continue
            found[(Path(name) / below).as_posix()] = file
    yield from sorted(found.items())


def code_fingerprint() -> str:
    """16 hex digits of the names and contents of `code_files`, the same for every kind of
    installation: wheel, editable install, copy.
    """
    digest = hashlib.sha256()
    for name, file in code_files():
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def describe_code() -> tuple[str, str]:
    """(fingerprint, folder) of the code that this process runs; the fingerprint is "" and the
    folder a reason where none is installed.
    """
    try:
        return code_fingerprint(), str(package_folders()[""])
    except ModuleNotFoundError as error:
        return "", str(error)


def copy_code(target: Path) -> None:
    """Copy the package to the folder `target`, its sub-packages below it."""
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    for name, folder in package_folders().items():
        shutil.copytree(folder, target / name, ignore=ignored, dirs_exist_ok=True)


def link_code(target: Path) -> None:
    """Like `copy_code`, by symbolic links to this process's own files."""
    target.mkdir(parents=True)
    folders = package_folders()
    for entry in folders.pop("").iterdir():
        if entry.name not in (*SUBPACKAGES, "__pycache__"):
            (target / entry.name).symlink_to(entry.absolute())
    for name, folder in folders.items():
        (target / name).symlink_to(folder.absolute(), target_is_directory=True)
