"""Machines with a network of their own, and links that can be taken down: network namespaces.

    with network(2) as (first, second), own_cluster(..., host=first) as cluster:
        cluster.add_node(num_cpus=1, host=second)
        second.take_link_down()

A host is a namespace with one interface, `eth0`, whose other end is a port of a bridge; the bridge
is in a namespace too, so nothing shows in this machine's own network, and addresses collide with
nobody's. The namespaces have no names: they last while this process holds them open or a process is
in them, so that its end and theirs, however they come, leave nothing. It takes root.

How processes find the interface: Ray is told the address (`LocalHead`, `node_process.py`; a driver
takes that of the node beside it). gloo looks up the machine's name, gets an address that is not the
host's, and falls back to loopback, where its peers do not reach it; so `Host.variables` names the
interface to gloo and NCCL, in the head, the nodes, and all that they start. There is no route to
anywhere else, so that what looks for it (name servers) fails at once, not after a time-out.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

CLONE_NEWNET = 0x40000000
"""From linux/sched.h."""
OWN_NAMESPACE = "/proc/thread-self/ns/net"


@dataclass(frozen=True)
class Namespace:
    """A network namespace, named by a path in /proc that all processes of root can open."""

    path: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block this thread is there, with the processes and threads that it starts.

        A socket stays where it was made.
        """
        with _opened(OWN_NAMESPACE) as before, _opened(self.path) as within:
            _system_call("setns", within, CLONE_NEWNET)
            try:
                yield
            finally:
                _system_call("setns", before, CLONE_NEWNET)

    def ip(self, arguments: str) -> None:
        """Configure its network with iproute2."""
        with self.entered():
            subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """One machine of a network. A copy in any process of this machine (actors too) will do."""

    namespace: Namespace
    ip: str
    bridge: Namespace
    port: str

    @property
    def variables(self) -> dict[str, str]:
        """The environment of Ray's processes here, which is not to be held to loopback."""
        return {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
        }

    def take_link_down(self) -> None:
        """Part it from all other hosts. Connections stay, and nothing comes through them."""
        self.bridge.ip(f"link set {self.port} down")

    def take_link_up(self) -> None:
        self.bridge.ip(f"link set {self.port} up")

    def part_from(self, other: Host) -> None:
        """Take down the link between the two alone. Connections stay, and nothing comes through."""
        for one, its_peer in ((self, other), (other, self)):
            nobody = "02:00:00:00:00:01"
            one.namespace.ip(f"neigh replace {its_peer.ip} lladdr {nobody} dev eth0 nud permanent")


@contextmanager
def network(num_hosts: int) -> Iterator[list[Host]]:
    """Some hosts that reach each other. Skips the test where that cannot be."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and the program ip (iproute2)")
    with ExitStack() as resources:
        try:
            bridge = resources.enter_context(_new_namespace())
            bridge.ip("link add bridge type bridge")
            bridge.ip("link set bridge up")
            hosts = []
            for number in range(1, num_hosts + 1):
                namespace = resources.enter_context(_new_namespace())
                hosts.append(Host(namespace, f"10.77.0.{number}", bridge, f"port{number}"))
                _plug_in(hosts[-1])
        except PermissionError as error:
            pytest.skip(f"network namespaces are not allowed here: {error}")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no bridge of network namespaces: {error}: {error.stderr.decode()}")
        yield hosts


def _plug_in(host: Host) -> None:
    host.bridge.ip(f"link add {host.port} type veth peer name eth0 netns {host.namespace.path}")
    host.bridge.ip(f"link set {host.port} master bridge up")
    host.namespace.ip("link set lo up")
    host.namespace.ip(f"address add {host.ip}/24 dev eth0")
    host.namespace.ip("link set eth0 up")


@contextmanager
def _new_namespace() -> Iterator[Namespace]:
    # A thread that ends: the one that makes a namespace is in it.
    with ThreadPoolExecutor(1) as executor:
        descriptor = executor.submit(_unshare).result()
    try:
        yield Namespace(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _unshare() -> int:
    _system_call("unshare", CLONE_NEWNET)
    return os.open(OWN_NAMESPACE, os.O_RDONLY)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _system_call(name: str, *arguments: int) -> None:
    if ctypes.CDLL(None, use_errno=True)[name](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
