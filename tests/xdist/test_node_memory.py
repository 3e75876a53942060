"""Servers that share memory with a worker do what others do, to the bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.local_servers import (
    LocalServers,
    Worker,
    check,
    gradients_of,
    servers_of,
    settled,
    with_servers,
)
from xdist import native_update, weights_board, wire
from xdist.errors import LeaseLost
from xdist.gradient_slots import GradientSlots
from xdist.server_messages import Reply
from xdist.weights_board import BoardReader

pytestmark = pytest.mark.skipif(
    not (weights_board.is_available() and native_update.is_available()),
    reason="native/ is not built; pip install . builds it where there is a compiler",
)


class Neighbour:
    """A worker in the memory of the servers' node."""

    def __init__(self, servers: LocalServers, worker: Worker) -> None:
        self.worker = worker
        self._servers = servers
        self.size = servers.ranges[-1][1]
        dtype = wire.dtype_of(servers.config.servers)
        self.slots = GradientSlots.create("slots", num_slots=1, size=self.size, dtype=dtype)
        self.boards: list[BoardReader] = []

    @classmethod
    async def connected(cls, servers: LocalServers, number: int) -> Neighbour:
        self = cls(servers, await Worker.registered(servers, number))
        await settled()  # Servers have heard of its token.
        for primary in servers.primaries:
            who = number, self.worker.token
            board = await primary.server.connect(*who, self.slots.address)
            assert board is not None
            self.boards.append(BoardReader(board))
        return self

    async def pushing(self, gradients: Any, **facts: Any) -> asyncio.Future[list[Reply]]:
        """A push that is under way."""
        self.slots.slots[0].copy_(torch.from_numpy(gradients))
        push = await self.worker.described(**facts)
        lead, *others = (primary.server for primary in self._servers.primaries)
        calls = [lead.push(push.id, push, 0), *(other.push(push.id, None, 0) for other in others)]
        return asyncio.ensure_future(asyncio.gather(*calls))

    async def push(self, gradients: Any, **facts: Any) -> list[Reply]:
        return await (await self.pushing(gradients, **facts))

    def weights(self, version: int) -> Tensor:
        out = torch.empty(self.size)
        for reader, (start, stop) in zip(self.boards, self._servers.ranges, strict=True):
            assert reader.read(out[start:stop], min_version=version, timeout_s=10) == version
        return out


async def pulled(servers: LocalServers, version: int) -> Tensor:
    """What a worker elsewhere gets."""
    replies = [await primary.server.pull(version) for primary in servers.primaries]
    return torch.cat(
        [wire.as_tensor(reply.weights).float() for reply in replies if reply.weights is not None]
    )


@pytest.mark.parametrize("as_what", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_servers", [1, 3])
def test_a_push_through_memory_equals_one_that_is_sent(
    tmp_path: Path, num_servers: int, as_what: Literal["float32", "bfloat16"]
) -> None:
    async def scenario() -> None:
        config = with_servers(wire=as_what)
        near = servers_of(tmp_path / "near", num_servers=num_servers, config=config)
        far = servers_of(tmp_path / "far", num_servers=num_servers, config=config)
        await near.begin()
        await far.begin()
        neighbour = await Neighbour.connected(near, 0)
        stranger = await Worker.registered(far, 0)
        dtype = wire.dtype_of(config.servers)
        for number, gradients in enumerate(gradients_of(near, 5), start=1):
            replies = await neighbour.push(gradients)
            assert all(reply.weights is None for reply in replies)
            sent: Any = wire.as_vector(torch.from_numpy(gradients).to(dtype))
            await stranger.push(sent)
            weights = neighbour.weights(number)
            assert torch.equal(weights, await pulled(far, number))
            assert torch.equal(weights, await pulled(near, number))

    check(scenario)


def test_what_was_committed_is_applied_though_its_worker_was_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        near, far = (servers_of(tmp_path / name, num_servers=2) for name in ("near", "far"))
        await near.begin()
        await far.begin()
        [gradients] = gradients_of(near, 1)
        neighbour = await Neighbour.connected(near, 0)
        near.followers[0].held_back = []
        push = await neighbour.pushing(gradients)
        await near.lead.pull(1)
        await near.lead.release(0)
        again = await Neighbour.connected(near, 0)
        again.slots.slots[0].fill_(torch.nan)
        del neighbour
        near.followers[0].deliver()
        await (await Worker.registered(far, 0)).push(gradients)
        assert torch.equal(await pulled(near, 1), await pulled(far, 1))
        push.cancel()

    check(scenario)


def test_a_worker_that_was_replaced_is_not_read_any_more(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=2)
        await servers.begin()
        [gradients] = gradients_of(servers, 1)
        old = await Neighbour.connected(servers, 0)
        await Worker.registered(servers, 0)
        await settled()
        with pytest.raises(LeaseLost):
            await old.push(gradients)
        with pytest.raises(LeaseLost):
            await servers.lead.connect(0, old.worker.token, old.slots.address)

    check(scenario)


@pytest.mark.parametrize("number", [0, 1])
def test_a_replica_has_what_its_primary_saw_in_memory(tmp_path: Path, number: int) -> None:
    async def scenario() -> None:
        servers, plain = (servers_of(tmp_path / name, num_servers=2) for name in ("a", "b"))
        await servers.begin()
        await plain.begin()
        for which in range(2):
            await servers.replicate(which)
        gradients = gradients_of(servers, 3)
        neighbour = await Neighbour.connected(servers, 0)
        alone = await Worker.registered(plain, 0)
        for gradient in gradients[:2]:
            await neighbour.push(gradient)
            await alone.push(gradient)
        await servers.fail_over(number)
        await servers.begin()
        neighbour = await Neighbour.connected(servers, 0)
        await neighbour.push(gradients[2], base_version=2)
        await alone.push(gradients[2], base_version=2)
        assert torch.equal(neighbour.weights(3), await pulled(plain, 3))

    check(scenario)


def test_memory_of_a_process_that_is_gone_is_not_shared(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        slots = GradientSlots.create("slots", num_slots=1, size=10, dtype=torch.float32)
        address = slots.address
        del slots
        assert await servers.lead.connect(0, worker.token, address) is None

    check(scenario)
