"""WeightsBoard: where a server publishes the weights of its range to the workers of its node.

The server writes each version into the next one of a few buffers, in place; to publish it is only
to say that it is whole. A worker copies the newest one out, looks again whether it was overwritten
meanwhile, and if so reads the one that is newest then. So no version that it gets is torn, and
there is no lock that a process could die with.

Three buffers do: one that is being written, the newest, and the one before, which somebody may
still be copying. With two, a reader that takes longer than an update reads again; with one, it has
to find the time between two updates.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist import native_board
from xdist.errors import PeerLost
from xdist.shared_memory import PAGE, Segment, SegmentAddress, VectorLayout

LIVENESS_EVERY_S = 0.1
"""So often a reader that waits looks whether the writer lives."""


def is_available() -> bool:
    """Whether the compiled part is there; without it, a server cannot publish in this way."""
    return native_board.is_available()


@dataclass(frozen=True)
class BoardAddress:
    """Where the workers of the node find the board of a server."""

    segment: SegmentAddress
    layout: VectorLayout


class WeightsBoard:
    """The writer's end, for one thread at a time.

    Versions are counted from 0 and grow: a server that goes back to a checkpoint makes a new board.
    """

    def __init__(self, name: str, *, size: int, dtype: torch.dtype, num_buffers: int = 3) -> None:
        """For versions of `size` elements, float32 or bfloat16. Raises `NotShared`."""
        layout = VectorLayout(num_buffers, size, dtype)
        self._segment = Segment.create(name, PAGE + layout.num_bytes)
        self._stamps, self._buffers = _parts(self._segment, layout)
        self._newest = self._version = -1
        self.address = BoardAddress(self._segment.address, layout)

    def next_buffer(self) -> Tensor:
        """The buffer for the next version, to be written in full; no reader gets what it held. Of
        one buffer it is also the newest.

        Threads that write it past the caches (x86's movnt instructions) each end with a fence.
        """
        native_board.begin(self._stamps, self._next)
        return self._buffers[self._next]

    def publish(self, version: int) -> None:
        """The next buffer holds this version from now on, and is the newest one."""
        assert version > self._version, f"version {version} does not follow {self._version}"
        native_board.publish(self._stamps, self._next, version=version)
        self._newest, self._version = self._next, version

    @property
    def _next(self) -> int:
        return (self._newest + 1) % len(self._buffers)


class BoardReader:
    """A reader's end, in a process on the writer's node; for any number of threads."""

    def __init__(self, address: BoardAddress) -> None:
        """Raises `NotShared`."""
        layout = address.layout
        self._segment = Segment.open(address.segment, PAGE + layout.num_bytes)
        self._stamps, self._buffers = _parts(self._segment, layout)
        self._layout = layout

    def read(self, out: Tensor, *, min_version: int, timeout_s: float) -> int:
        """Copy the newest version to `out`, and return it, as soon as it is at least `min_version`.
        out: (size,) float32. Other threads run meanwhile.

        Raises `PeerLost` when the writer ends without such a version, or publishes none in time;
        `out` then holds anything. What is whole is read, whatever has become of its writer.
        """
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        assert out.numel() == self._layout.size
        writer = self._segment.owner
        writer_lives = True
        deadline = time.monotonic() + timeout_s
        while True:
            num_published = native_board.num_published(self._stamps)
            version = native_board.read(
                self._stamps,
                self._buffers,
                out,
                stride_bytes=self._layout.stride_bytes,
                min_version=min_version,
            )
            if version is not None:
                return version
            if not writer_lives:
                raise PeerLost(f"process {writer.process_id} ended before version {min_version}")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise PeerLost(
                    f"process {writer.process_id} had no version {min_version} in {timeout_s} s"
                )
            wait_s = min(left_s, LIVENESS_EVERY_S)
            # No wait where the copy was overwritten: something newer is there already.
            if not native_board.wait(self._stamps, num_published, timeout_s=wait_s):
                writer_lives = writer.is_alive  # One more look, for what it published at last.


def _parts(segment: Segment, layout: VectorLayout) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The page in which `native/board.c` keeps its stamps, and the buffers."""
    assert 0 < layout.num_vectors < PAGE // 16
    stamps = segment.view(torch.uint8, offset=0, size=PAGE)
    return stamps, layout.views(segment, offset=PAGE)
