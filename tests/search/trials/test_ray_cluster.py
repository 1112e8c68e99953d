"""Ray tasks gathered as they finish, on a private Ray of two CPUs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from vitpareto.methods import Code
from vitpareto.search.errors import UserError
from vitpareto.search.trials.ray_cluster import live_nodes, run_for_each, run_on_nodes, run_once

pytestmark = pytest.mark.usefixtures("capacity")


def test_each_item_has_its_value_or_its_error() -> None:
    def double(offset: int, item: int) -> int:
        if item == 2:
            raise UserError("item must not be 2", Code.OUT_OF_RANGE, got=item)
        return offset + 2 * item

    done = {d.item: d for d in run_for_each(double, 100, [1, 2, 3], cpus=1, gpus=0)}
    assert {item: d.value for item, d in done.items()} == {1: 102, 2: None, 3: 106}
    assert done[1].reason == "" and done[1].result() == 102
    error = done[2].error
    assert isinstance(error, UserError) and error.details == {"got": 2}
    assert done[2].reason == "UserError: item must not be 2"
    with pytest.raises(UserError):
        done[2].result()


def test_unfinished_items_are_polled(tmp_path: Path) -> None:
    def wait(path: Path, item: str) -> str:
        while not path.exists():
            time.sleep(0.05)
        return item

    path, polled = tmp_path / "go", []

    def on_poll(items: Any) -> None:
        polled.append(list(items))
        path.touch()

    tasks = run_for_each(wait, path, ["a"], cpus=1, gpus=0, poll_s=0.2, on_poll=on_poll)
    assert [d.result() for d in tasks] == ["a"]
    assert polled and polled[0] == ["a"]


def test_a_function_runs_once_on_each_node() -> None:
    nodes = live_nodes()
    assert len(nodes) == 1 and nodes[0].cpus >= 2
    assert [(d.item, d.result()) for d in run_on_nodes(lambda x: x + 1, nodes, 1)] == [
        (nodes[0], 2)
    ]
    assert run_once(lambda: "value", cpus=1, gpus=0) == "value"
