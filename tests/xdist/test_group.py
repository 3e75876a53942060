"""Groups of real ranks, in threads of this process: how they come together, and how they part."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from xdist.errors import PeerLost
from xdist.flat import Entry, Layout
from xdist.strategies.buckets import cut_buckets
from xdist.strategies.group import (
    PIECE,
    Group,
    NoteBoard,
    Rendezvous,
    Store,
    cancel,
    forget,
    open_store,
    reach_store,
)

CPU = torch.device("cpu")
JOIN_TIMEOUT_S = 20.0


def join(store: Store, rank: int, *, world_size: int, timeout_s: float = JOIN_TIMEOUT_S) -> Group:
    rendezvous = Rendezvous("127.0.0.1", store.port, generation=1)
    return Group(
        reach_store(rendezvous),
        rendezvous,
        rank=rank,
        world_size=world_size,
        own_address="127.0.0.1",
        device=CPU,
        timeout_s=timeout_s,
    )


def in_threads(world_size: int, act: Callable[[Group, int], object]) -> list[Future[object]]:
    """Each rank joins and acts, in a thread of its own."""
    store = open_store("127.0.0.1")

    def be(rank: int) -> object:
        return act(join(store, rank, world_size=world_size), rank)

    with ThreadPoolExecutor(world_size) as executor:
        return [executor.submit(be, rank) for rank in range(world_size)]


def test_ranks_sum_and_send() -> None:
    def act(group: Group, rank: int) -> list[float]:
        tensor = torch.full((3,), float(rank + 1))
        group.wait(group.all_reduce(tensor))
        other = torch.zeros(1)
        if rank == 0:
            group.send(torch.tensor([7.0]), to=1)
        elif rank == 1:
            group.receive(other, sender=0)
        return [*tensor.tolist(), other.item()]

    results = [future.result() for future in in_threads(3, act)]
    assert results == [[6.0, 6.0, 6.0, 0.0], [6.0, 6.0, 6.0, 7.0], [6.0, 6.0, 6.0, 0.0]]


def test_what_is_larger_than_a_piece_is_sent_whole() -> None:
    def act(group: Group, rank: int) -> bool:
        expected = torch.arange(float(PIECE + 5))
        if rank == 0:
            group.send(expected, to=1)
            return True
        received = torch.zeros(PIECE + 5)
        group.receive(received, sender=0)
        return torch.equal(received, expected)

    assert [future.result() for future in in_threads(2, act)] == [True, True]


def test_all_that_wait_are_freed_when_one_leaves() -> None:
    def act(group: Group, rank: int) -> str:
        group.wait(group.all_reduce(torch.ones(1)))  # Who leaves at once may not be met by all.
        if rank == 2:
            group.leave()
            return "left"
        try:
            group.wait(group.all_reduce(torch.ones(1000)))
        except PeerLost:
            message = "lost"
        group.leave()
        return message

    assert [future.result() for future in in_threads(4, act)] == ["lost", "lost", "left", "lost"]


def test_who_is_told_that_a_peer_is_lost_waits_no_longer() -> None:
    """Gloo may miss that a connection has ended: here none does."""
    has_left = threading.Event()

    def act(group: Group, rank: int) -> bool:
        """Before gloo itself gives up."""
        if rank == 0:
            return has_left.wait(JOIN_TIMEOUT_S / 2)
        work = group.all_reduce(torch.zeros(1))
        group.abort()
        with pytest.raises(PeerLost, match="a peer is lost"):
            group.wait(work)
        group.leave()
        has_left.set()
        return True

    assert [future.result() for future in in_threads(2, act)] == [True, True]


def test_who_does_not_come_is_waited_for_only_so_long() -> None:
    with pytest.raises(PeerLost, match="rank 0: the group did not come together"):
        join(open_store("127.0.0.1"), 0, world_size=2, timeout_s=0.2)


def test_a_rendezvous_that_is_cancelled_frees_who_waits() -> None:
    store = open_store("127.0.0.1")
    with ThreadPoolExecutor(1) as executor:
        joining = executor.submit(join, store, 0, world_size=2, timeout_s=50)
        cancel(store, Rendezvous("127.0.0.1", store.port, generation=1), world_size=2)
        with pytest.raises(PeerLost, match="the rendezvous was cancelled"):
            joining.result()


def test_a_driver_that_is_gone_is_a_lost_peer() -> None:
    with pytest.raises(PeerLost, match="the driver's rendezvous is not reached"):
        reach_store(Rendezvous("127.0.0.1", 1, generation=1), timeout_s=0.5)


def test_notes_are_read_once_and_outlast_their_writer() -> None:
    store = open_store("127.0.0.1")
    board = NoteBoard(store)
    assert board.read() == []
    writer = NoteBoard(reach_store(Rendezvous("127.0.0.1", store.port, generation=1)))
    writer.write("one")
    writer.write("two")
    del writer
    assert board.read() == ["one", "two"]
    assert board.read() == []


def test_a_generation_leaves_nothing_in_the_store() -> None:
    store = open_store("127.0.0.1")
    num_keys = store.num_keys()
    with ThreadPoolExecutor(2) as executor:
        groups = [executor.submit(join, store, rank, world_size=2) for rank in range(2)]
        for group in groups:
            group.result().leave()
    assert store.num_keys() > num_keys
    forget(store, Rendezvous("127.0.0.1", store.port, generation=1))
    assert store.num_keys() == num_keys


@pytest.mark.parametrize(("num_weights", "cuts"), [(1, 4), (5, 3), (10, 2), (100, 1)])
def test_buckets_cover_the_vector_from_its_end(num_weights: int, cuts: int) -> None:
    sizes, offset, entries = (3, 4, 2, 6), 0, []
    for number, size in enumerate(sizes):
        entries.append(Entry(str(number), (size,), offset))
        offset += size
    layout = Layout(tuple(entries), (), statistics_momentum=0.1)
    buckets = cut_buckets(layout, num_weights=num_weights)
    assert len(buckets) == cuts
    assert (buckets[0].stop, buckets[-1].start) == (15, 0)
    assert all(a.start == b.stop for a, b in pairwise(buckets))
    assert sorted(n for bucket in buckets for n in bucket.parameters) == [0, 1, 2, 3]
