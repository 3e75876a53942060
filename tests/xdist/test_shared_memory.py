"""Memory that processes of a node share, and gradients in it."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.children import child
from tests.xdist.memory_processes import error_of, hold_both, hold_slots, open_address, write_to
from xdist.errors import NotShared
from xdist.gradient_slots import GradientSlots, SlotsAddress
from xdist.shared_memory import Segment

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(4)}"


def processes_that_map(name: str) -> Iterator[int]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/memfd:{name} " in maps.read_text():
                yield int(maps.parent.name)
        except OSError:  # It has ended.
            continue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_server_reads_its_range_of_a_slot_in_place(name: str, dtype: torch.dtype) -> None:
    with child(hold_slots, name, dtype) as worker:
        address: SlotsAddress = worker.answer()
        slots = GradientSlots.open(address).slots
        own_range = slots[1][3:9_998]
        assert [slot.shape for slot in slots] == [(10_001,), (10_001,)]
        assert own_range.dtype == dtype
        for number in (0, 5):
            worker.ask((1, number))
            expected = torch.arange(number + 3, number + 9_998).to(dtype)
            assert torch.equal(own_range, expected), "what the worker put there is seen here"
        assert not slots[0].any()
        worker.kill()
        assert torch.equal(own_range, expected), "it outlives the worker"
        assert "gone" in error_of(address.segment)


def test_only_the_creator_writes(name: str) -> None:
    segment = Segment.create(name, 64)
    segment.view(torch.uint8, offset=0, size=64).fill_(2)
    with child(write_to, segment.address) as other:
        assert other.answer() == 128
        other.process.join()
        assert other.process.exitcode == -signal.SIGSEGV
    assert segment.view(torch.uint8, offset=0, size=64).sum() == 128


def test_a_segment_cannot_be_cut_off(name: str) -> None:
    segment = Segment.create(name, 64)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.truncate(f"/proc/self/fd/{segment.address.descriptor}", size)


def test_a_view_keeps_the_memory_and_nothing_else_does(name: str) -> None:
    segment = Segment.create(name, 1 << 20)
    address = segment.address
    view = segment.view(torch.float32, offset=4096, size=7)
    copy = Segment.open(address, 1 << 20).view(torch.float32, offset=4096, size=7)
    del segment
    gc.collect()
    assert error_of(address), "its creator let go of it"
    view.fill_(3)
    assert copy.tolist() == [3.0] * 7
    assert f"memfd:{name}" in Path("/proc/self/maps").read_text()
    del view, copy
    assert f"memfd:{name}" not in Path("/proc/self/maps").read_text()


def test_what_is_not_the_segment_is_refused(name: str) -> None:
    segment = Segment.create(name, 64)
    other = Segment.create(name, 64)
    address = pickle.loads(pickle.dumps(segment.address))
    read_end, write_end = os.pipe()
    assert error_of(address) == ""
    assert "64 bytes, not 65" in error_of(address, 65)
    assert "another key" in error_of(replace(address, descriptor=other.address.descriptor))
    assert "no shared memory" in error_of(replace(address, descriptor=read_end))
    os.close(read_end)
    os.close(write_end)
    assert "cannot be mapped" in error_of(replace(address, descriptor=read_end))
    with subprocess.Popen(["true"]) as gone:
        pass
    assert "gone" in error_of(replace(address, process_id=gone.pid))


def test_no_descriptor_is_left_of_a_refusal(name: str) -> None:
    segment = Segment.create(name, 64)
    before = os.listdir("/proc/self/fd")
    error_of(replace(segment.address, key=b"another"))
    error_of(segment.address, 65)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(NotShared, match="no 1048576 bytes of shared memory"):
            Segment.create(name, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir("/proc/self/fd") == before


@AS_ROOT
def test_another_user_is_refused(name: str) -> None:
    segment = Segment.create(name, 64)
    with child(open_address, segment.address, os.getuid()) as same_user:
        assert same_user.answer() == ""
    with child(open_address, segment.address, 65534) as nobody:
        assert "Permission denied" in nobody.answer()


@AS_ROOT
def test_a_container_with_process_ids_of_its_own_is_refused(name: str) -> None:
    segment = Segment.create(name, 64)
    unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("unshare makes no namespace of process ids here")
    script = (
        "import pickle; from tests.xdist.memory_processes import error_of\n"
        f"print(error_of(pickle.loads({pickle.dumps(segment.address)!r})))"
    )
    printed = subprocess.run(
        [*unshare, sys.executable, "-c", script], check=True, capture_output=True
    ).stdout
    assert b"is gone or elsewhere" in printed


def test_nothing_is_left_when_all_are_killed(name: str) -> None:
    with child(hold_both, name) as one, child(hold_both, name) as other:
        addresses = one.answer(), other.answer()
        one.ask(addresses[1])
        other.ask(addresses[0])
        assert sorted(processes_that_map(name)) == sorted([one.process_id, other.process_id])
        one.kill()
        assert list(processes_that_map(name)) == [other.process_id]
        other.kill()
        assert list(processes_that_map(name)) == []
    assert not [entry for entry in os.listdir("/dev/shm") if name in entry]
