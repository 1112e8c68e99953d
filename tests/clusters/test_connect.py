"""This machine as a Ray cluster: on loopback, as many CPUs as asked for, and gone afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.refusals import refused
from vitpareto.clusters.connect import joined_cluster
from vitpareto.methods import Code

PROGRAM = """
import os, sys, time
import ray
from vitpareto.clusters.connect import local_cluster

def family(pid):
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = open(f"/proc/{name}/stat").read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                table.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [pid]
    while todo:
        mine = table.get(todo.pop(), [])
        found += mine
        todo += mine
    return found

with local_cluster(workers=(os.cpu_count() or 1) + 3) as capacity:
    assert capacity.cpus == (os.cpu_count() or 1) + 3, capacity
    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1", node
    with local_cluster() as inner:
        assert inner == capacity, "a running Ray is joined"
    assert ray.is_initialized(), "and left running"
    started = family(os.getpid())
    assert started
assert not ray.is_initialized()
deadline = time.monotonic() + 300
while set(started) & set(family(os.getpid())) and time.monotonic() < deadline:
    time.sleep(0.1)
print("left:", sorted(set(started) & set(family(os.getpid()))))
"""


def test_a_local_cluster_is_on_loopback_and_leaves_no_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},  # must not be joined
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "left: []", done.stdout


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("http://head:8265", Code.WRONG_TYPE),
        ("127.0.0.1:9", Code.UNAVAILABLE),
        ("head", Code.UNAVAILABLE),
    ],
)
def test_an_unreachable_cluster_is_refused(address: str, code: Code) -> None:
    with refused(code), joined_cluster(address):
        pass
