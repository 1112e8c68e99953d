"""The rooms: every import between them is allowed, none makes a circle, heavy packages have owners.

`python -m tests.architecture` prints the arrows that are tested here.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict
from pathlib import Path

from tests.architecture import (
    ALLOWED,
    FOLDERS,
    LATE,
    OWNERS,
    PACKAGE,
    ROOT,
    allowed,
    arrows,
    imports_of,
    module_of,
    packages,
    room_of,
    sources,
)

ORDER = list(ALLOWED)


def test_rooms_import_only_what_the_list_allows() -> None:
    wrong = [
        f"{one} ({here} may not import {there})"
        for (here, there), found in arrows().items()
        if not allowed(here, there)
        for one in found
    ]
    assert not wrong, "\n".join(wrong)


def test_every_allowed_arrow_is_used() -> None:
    """The list stays short: what nobody imports is not allowed."""
    used = set(arrows())
    idle = [
        (room, name)
        for room, names in ALLOWED.items()
        for name in names.split()
        if not name.endswith(".*") and (room, name) not in used and name != "search"
    ]
    assert not idle


def test_no_circle_among_rooms() -> None:
    below: dict[str, set[str]] = defaultdict(set)
    for here, there in arrows():
        below[here].add(there)
    assert list(graphlib.TopologicalSorter(below).static_order())


def test_no_circle_among_modules() -> None:
    modules = {module_of(path): path for path in sources()}
    below = {
        name: {
            target.removeprefix(f"{PACKAGE}.")
            for target in (one.target for one in imports_of(path))
            if target.removeprefix(f"{PACKAGE}.") in modules and target != f"{PACKAGE}.{name}"
        }
        for name, path in modules.items()
    }
    assert list(graphlib.TopologicalSorter(below).static_order())


def test_imports_inside_functions_are_those_of_commands_and_of_the_list() -> None:
    """They count as arrows too; the list says why each is inside a function."""
    late: dict[str, list[str]] = defaultdict(list)
    for path in sources():
        for one in imports_of(path):
            if one.late and one.target.split(".")[0] == PACKAGE and "commands" not in str(path):
                late[path.relative_to(ROOT).as_posix()].append(str(one))
    assert late.keys() == LATE.keys(), late


def test_a_package_is_imported_by_its_owners_alone() -> None:
    wrong = [
        str(one)
        for (package, room), found in packages().items()
        if room not in OWNERS.get(package, ())
        for one in found
    ]
    # the MLflow server's file starts a process and needs no import: see dashboards/mlflow_server.py
    assert not wrong, "\n".join(wrong)


def test_every_owner_imports_its_package() -> None:
    listed = {(package, room) for package, rooms in OWNERS.items() for room in rooms}
    assert not listed - packages().keys()


def test_methods_import_torch_timm_and_a_reader_of_yaml_alone() -> None:
    used = {package for package, room in packages() if room.startswith("methods")}
    assert used == {"torch", "timm", "yaml"}


def test_nothing_is_imported_under_another_name() -> None:
    """One import name: in a checkout the folders could be imported by their own names too."""
    wrong = [
        str(one)
        for path in [*sources(), *(ROOT / "tests").rglob("*.py")]
        for one in imports_of(path)
        if one.target.split(".")[0] in FOLDERS
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_code_is_a_room_that_says_what_it_is_for() -> None:
    for folder in sorted({path.parent for path in sources()}):
        start = folder / "__init__.py"
        assert start.is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"
        name = module_of(start)  # a folder within a room belongs to that room
        assert name.startswith(room_of(name)), f"{folder} lies in no room"
        assert len(_docstring(start).split()) >= 8, start


def test_every_room_of_search_names_the_rooms_that_it_may_import() -> None:
    """The sentence "May import ...; not ..." agrees with the list."""
    rooms = {name.removeprefix("search.") for name in ALLOWED if name.startswith("search.")}
    for room in rooms - {"commands"}:  # which may import all
        text = _docstring(ROOT / "search" / room / "__init__.py").replace("\n", " ")
        assert "May import " in text, room
        said, _, refused = text.partition("May import ")[2].partition(". ")[0].partition("not ")
        may = {name.removeprefix("search.") for name in ALLOWED[f"search.{room}"].split()}
        assert set(re.findall(r"\w+", said)) & rooms == may & rooms, room
        assert not set(re.findall(r"\w+", refused)) & may, room


def test_every_file_says_what_it_is_for() -> None:
    for path in sources():
        assert len(_docstring(path).split()) >= 4, path.relative_to(ROOT)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
