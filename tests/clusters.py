"""Fixtures for a real Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
import ray
from local_head import LocalHead
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalHead]:
    """The Ray of the whole test run, which this process is connected to: 8 CPUs by name."""
    variables = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}",
        "RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"],
    }
    with LocalHead(num_cpus=8, variables=variables) as head:
        ray.init(address=head.address, log_to_driver=False)
        yield head
        ray.shutdown()


@dataclass(frozen=True)
class SecondNode:
    """Another node of the cluster, and the process whose SIGTERM ends it."""

    node_id: str
    process_id: int
    ends_from_first: bool = False
    """For tests that end it: from a worker on the first node."""


@pytest.fixture
def second_node(cluster: LocalHead) -> Iterator[SecondNode]:
    """Another real node (a raylet of its own, 2 CPUs) in the cluster of the test run."""
    known = {node["NodeID"] for node in ray.nodes()}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("second_node.py")), cluster.address],
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield SecondNode(wait_until(lambda: new_node(known)), process.pid)
    finally:
        process.terminate()
        process.wait()
        wait_until(lambda: None if new_node(known) else "gone")


def new_node(known: set[str]) -> str | None:
    """The id of an alive node that is not among the known ones."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return next(iter(alive - known), None)


def wait_until(attempt: Callable[[], Result | None], *, limit_s: float = 60) -> Result:
    """What the attempt returns, once that is something."""
    retrying = Retrying(
        retry=retry_if_result(lambda value: value is None),
        wait=wait_fixed(0.2),
        stop=stop_after_delay(limit_s),
    )
    result = retrying(attempt)
    assert result is not None
    return result
