"""The parts of torch that exports rely on beyond its documented interface, in one place.

AOTInductor's packaging is a private module. Checked with the range of torch in pyproject.toml.
"""

from __future__ import annotations

from pathlib import Path

import torch

#: text of a program that loads the package at the path in the variable `package`
LOAD_PACKAGE = "torch._inductor.aoti_load_package({package})"


def compile_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an AOTInductor package for this machine's CPU. Raises what the compiler raises."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
