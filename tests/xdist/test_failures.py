"""What is said of a lost actor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from datapipe.errors import MissingShard
from xdist.failures import fault_of
from xdist.topologies import Task

OF_RAY = (
    "3 worker(s) were killed due to the node running low on memory.\nMemory on the node (IP: "
    "192.0.2.2, ID: 45d56f) was 22.40GB used / 23.54GB limit (0.951367), which exceeds the "
    "memory usage threshold of 0.95."
)


def test_a_node_without_memory_is_told_of_with_what_needs_less() -> None:
    fault = fault_of(Task("worker 1", "train", 1), OutOfMemoryError(OF_RAY))
    assert fault is not None
    assert "out of memory (22.40GB used / 23.54GB limit)" in fault.cause
    assert "batch_size" in fault.cause


IMPORT_FAILED = RayTaskError("start", "Traceback\nImportError: no CUDA", ImportError("no CUDA"))
INIT_FAILED = ActorDiedError(IMPORT_FAILED)


@pytest.mark.parametrize("error", [IMPORT_FAILED, INIT_FAILED])
def test_what_keeps_a_newcomer_from_starting_is_its_nodes_and_else_a_bug(error: RayError) -> None:
    fault = fault_of(Task("worker 1", "start", 1, is_alone=True), error)
    assert fault is not None
    assert fault.kind == "unfit"
    assert "no CUDA" in fault.cause
    assert fault_of(Task("worker 1", "start", 1), error) is None


def test_a_shard_that_only_one_node_lacks_is_no_error_of_the_user(tmp_path: Path) -> None:
    """As where a file system is not mounted there any more."""
    for is_there in (False, True):
        urls = (str(tmp_path / "shard.tar"),)
        error = RayTaskError("train", "Traceback", MissingShard(urls))
        fault = fault_of(Task("worker 1", "train", 1), error)
        assert (fault is not None and fault.kind == "lost") == is_there
        (tmp_path / "shard.tar").touch()
    remote = RayTaskError("train", "Traceback", MissingShard(("s3://bucket/shard.tar",)))
    assert fault_of(Task("worker 1", "train", 1), remote) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("uncorrectable ECC error"),
        OutOfDiskError("no space"),
        ObjectStoreFullError("no memory"),
    ],
)
def test_a_gpu_that_fails_or_a_node_that_is_full_costs_its_worker(error: Exception) -> None:
    fault = fault_of(Task("worker 1", "train", 1), RayTaskError("train", "Traceback", error))
    assert fault is not None
    assert fault.kind == "lost"
    assert str(error).startswith(fault.cause)
