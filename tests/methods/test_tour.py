"""The tour runs from its first cell to its last, and shows what its committed outputs show."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from vitpareto import methods

TOUR = Path(methods.__file__).with_name("tour.ipynb")
ROOT = TOUR.parents[1]


def committed() -> NotebookNode:
    return nbformat.read(TOUR, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed() -> Iterator[NotebookNode]:
    """The notebook run afresh, as in Jupyter, with this tree's packages."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, folder)  # nothing of the user's, and nothing left behind

        class Sockets(AsyncKernelManager):
            """Talks to the kernel by files of this folder: no port is taken, none is open."""

            def __init__(self, **options: object) -> None:
                super().__init__(**options, transport="ipc", ip=f"{folder}/k")

        notebook = committed()
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        NotebookClient(
            notebook,
            kernel_manager_class=Sockets,
            timeout=200,
            resources={"metadata": {"path": str(ROOT)}},
        ).execute()
        yield notebook


def shown(cell: NotebookNode) -> list[str]:
    """A cell's outputs as text, with what depends on the processor left open: percentages, and
    every number of a cell tagged `timed`.
    """
    numbers = r"\d+(\.\d+)?" if "timed" in cell.metadata.get("tags", ()) else r"\d+\.\d+ %"
    out = []
    for output in cell.outputs:
        if output.output_type == "stream":
            out.append(f"{output.name}: {output.text}")
        else:
            out.append("picture" if "image/png" in output.data else output.data["text/plain"])
    return [re.sub(numbers, "N", text) for text in out]


@pytest.mark.slow
def test_it_runs_and_shows_what_is_committed(executed: NotebookNode) -> None:
    new, old = code_cells(executed), code_cells(committed())
    assert [shown(cell) for cell in new] == [shown(cell) for cell in old]
    assert sum(shown(cell).count("picture") for cell in old) == 2
    assert not [text for cell in old for text in shown(cell) if text.startswith("stderr")]


@pytest.mark.slow
def test_no_process_is_left(executed: NotebookNode) -> None:
    there = (p.info for p in psutil.process_iter(["ppid", "cmdline"]))
    ours = [p["cmdline"] or [] for p in there if p["ppid"] == os.getpid()]
    assert not [command for command in ours if "ipykernel_launcher" in command]


def test_it_is_short_and_holds_nothing_of_the_machine_that_ran_it() -> None:
    notebook = committed()
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12
    assert TOUR.stat().st_size < 300_000
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it from the top, in one go"
    texts = [str(notebook.metadata)]
    texts += [part for c in code_cells(notebook) for part in (c.source, str(c.metadata), *shown(c))]
    for text in texts:
        assert not re.search(r"/tmp/|/home/|/root|/Users/|site-packages|[A-Z]:\\", text)
