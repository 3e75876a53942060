"""Whether ranks reach each other; links that are down are in `tests/xdist/test_elastic.py`."""

from __future__ import annotations

import gc

import pytest

from tests.namespaces import network
from xdist.strategies.door import Door

LOOPBACK = "127.0.0.1"


def test_a_peer_is_reached_while_it_listens_and_when_it_has_left() -> None:
    door, peer = Door(LOOPBACK), Door(LOOPBACK)
    door.know({1: peer.place})
    assert door.unreached() == ()
    peer.close()
    assert door.unreached() == ()
    door.close()


def test_more_peers_are_reached_than_a_queue_has_places_for() -> None:
    door, peer = Door(LOOPBACK), Door(LOOPBACK)
    door.know(dict.fromkeys(range(200), peer.place))
    assert door.unreached() == ()
    door.close()
    peer.close()


def test_a_door_of_a_group_that_did_not_meet_knows_of_nobody() -> None:
    assert Door(LOOPBACK).unreached() == ()
    gc.collect()  # It closes by itself; an open socket would be a warning, which is an error.


@pytest.mark.faults
def test_peers_behind_links_that_are_down_are_named() -> None:
    with network(4) as (own, *others):
        doors = []
        for host in (own, *others):
            with host.namespace.entered():
                doors.append(Door(host.ip))
        doors[0].know({rank: door.place for rank, door in enumerate(doors) if rank != 0})
        own.part_from(others[0])
        others[2].take_link_down()
        with own.namespace.entered():
            assert doors[0].unreached() == (1, 3)
