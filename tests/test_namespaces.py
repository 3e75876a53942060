"""Hosts whose links go down and up, and a Ray cluster that spans them."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import QUICK_HEALTH_CHECKS, own_cluster, wait_until
from tests.namespaces import Host, network

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with network(2) as made:
        yield made


def test_a_parted_host_is_not_reached_until_its_link_is_up(hosts: list[Host]) -> None:
    first, second = hosts
    with first.namespace.entered(), socket.create_server((first.ip, 0)) as server:
        address = server.getsockname()
        assert connects(second, address)
        second.take_link_down()
        assert not connects(second, address, timeout_s=1)
        second.take_link_up()
        assert connects(second, address)


def test_hosts_that_are_parted_reach_others() -> None:
    with network(3) as (first, second, third):
        first.part_from(second)
        for host, reached in ((second, False), (third, True)):
            with host.namespace.entered(), socket.create_server((host.ip, 0)) as server:
                assert connects(first, server.getsockname(), timeout_s=1) == reached


def connects(host: Host, address: tuple[str, int], *, timeout_s: float = 10) -> bool:
    """A try that goes on while a link comes up may wait: ARP and TCP ask again every 1, 2, 4 s."""
    with host.namespace.entered():
        try:
            socket.create_connection(address, timeout=timeout_s).close()
        except OSError:
            return False
        return True


def test_nothing_of_a_network_shows_outside_or_stays() -> None:
    before, descriptors = socket.if_nameindex(), os.listdir("/proc/self/fd")
    with network(2) as (first, _):
        assert socket.if_nameindex() == before
        with first.namespace.entered():
            assert [name for _, name in socket.if_nameindex()] == ["lo", "eth0"]
        path = first.namespace.path
    assert not os.path.exists(path)
    assert os.listdir("/proc/self/fd") == descriptors


@pytest.mark.ray
def test_a_collective_across_a_parted_link_times_out_and_the_node_is_given_up(
    hosts: list[Host], tmp_path: Path
) -> None:
    first, second = hosts
    command = [sys.executable, "-m", "tests.parted_ranks", str(tmp_path)]
    with (
        own_cluster(num_cpus=1, variables=QUICK_HEALTH_CHECKS, host=first) as cluster,
        (tmp_path / "output").open("wb") as output,
    ):
        node = cluster.add_node(num_cpus=1, host=second)
        driver = cluster.start_driver(command, output=output)
        wait_until(lambda: (tmp_path / "joined").exists() or driver.poll() is not None or None)
        num_processes = len(node.process_ids())
        second.take_link_down()
        (tmp_path / "parted").touch()
        file = tmp_path / "found"
        wait_until(lambda: file.exists() or driver.poll() is not None or None)
        found = json.loads(file.read_text())
        assert found["sums"] == [2, 2]
        assert "Timed out waiting 2000ms" in found["collective"]
        assert "its node has died" in found["call"]
        assert found["alive"] == [True, False]
        second.take_link_up()
        # A raylet that hears that it was given up ends, and its workers with it.
        wait_until(lambda: "ended" if len(node.process_ids()) < num_processes else None)
        again = cluster.add_node(num_cpus=1, host=second)
        assert again.node_id != node.node_id
