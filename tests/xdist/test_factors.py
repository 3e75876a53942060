"""Gradients of linear layers, sent as factors: the same gradients, up to the order of sums."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.local_servers import LocalServers, Worker, check, servers_of
from tests.strategies import collect_gradients
from xdist import wire
from xdist.flat import FlatModel
from xdist.product import Product
from xdist.strategies.factors import Factors

NUM_SAMPLES = 3


def network() -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(
        nn.Sequential(nn.Linear(6, 20), nn.ReLU(inplace=True), nn.Linear(20, 31), nn.Linear(31, 2))
    )


def backward(flat: FlatModel, *, num_parts: int = 1) -> Tensor:
    """The gradient of a batch, which is also in the flat vector."""
    images = torch.randn(NUM_SAMPLES * num_parts, 6)
    parts: Any = torch.split(images, NUM_SAMPLES)
    for part in parts:
        flat.model(part).square().sum().backward()
    collect_gradients(flat)
    return flat.gradients


def assembled(factors: Factors, start: int, stop: int, gradients: Tensor) -> tuple[Tensor, int]:
    """Weights [start, stop) as they are sent, and how many of them as products."""
    out, num_in_products, place = torch.full((stop - start,), torch.nan), 0, start
    for first, last, product in factors.split(start, stop):
        assert first == place < last
        place = last
        if product is not None:
            num_in_products += last - first
            out[first - start : last - start] = wire.as_tensor(product.values()).float()
        else:
            out[first - start : last - start] = gradients[first:last]
    assert place == stop
    return out, num_in_products


FIRST, SECOND = 6 * 20, 20 * 31
"""Weights of the layers; their factors have 26 and 51 floats a sample."""


@pytest.mark.parametrize(
    ("num_parts", "flop_per_byte", "expected"),
    [
        (1, 18.0, FIRST + SECOND),
        (1, 4.0, SECOND),  # 720 operations for 168 bytes; 3,720 for 1,868.
        (1, 1.0, 0),
        (2, 18.0, SECOND),
        (4, 18.0, 0),
        (4, math.inf, SECOND),
        (5, math.inf, 0),
    ],
)
def test_products_are_the_gradient_and_are_sent_where_they_are_sooner_there(
    num_parts: int, flop_per_byte: float, expected: int
) -> None:
    flat = network()
    factors = Factors(flat, torch.float32, flop_per_byte=flop_per_byte)
    factors.is_wanted = True
    for _ in range(2):
        gradients = backward(flat, num_parts=num_parts)
        whole, num_in_products = assembled(factors, 0, len(gradients), gradients)
        assert torch.allclose(whole, gradients, rtol=1e-4, atol=1e-4)
        assert num_in_products == expected
        factors.clear()


@given(st.data())
def test_any_range_is_the_part_of_the_gradient(data: st.DataObject) -> None:
    flat = network()
    factors = Factors(flat, torch.float32, flop_per_byte=18.0)
    factors.is_wanted = True
    gradients = backward(flat)
    start = data.draw(st.integers(0, len(gradients) - 1))
    stop = data.draw(st.integers(start + 1, len(gradients)))
    part, _ = assembled(factors, start, stop, gradients)
    assert torch.allclose(part, gradients[start:stop], rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_that_nobody_wants() -> None:
    flat = network()
    factors = Factors(flat, torch.float32, flop_per_byte=18.0)
    gradients = backward(flat)
    assert not any(layer.factors for layer in factors.layers)
    assert assembled(factors, 0, len(gradients), gradients)[1] == 0


def test_factors_are_rounded_as_all_that_is_sent() -> None:
    flat = network()
    factors = Factors(flat, torch.bfloat16, flop_per_byte=8.0)
    factors.is_wanted = True
    gradients = backward(flat)
    [product] = [p for _, _, p in factors.split(0, len(gradients)) if p is not None]
    assert product.inputs.dtype == product.output_gradients.dtype == np.uint16
    whole, _ = assembled(factors, 0, len(gradients), gradients)
    assert torch.allclose(whole, gradients, rtol=0.05, atol=0.05 * gradients.abs().max().item())


def test_a_layer_may_be_used_twice_and_one_that_shares_its_weight_is_sent_as_it_is() -> None:
    layer, shared = nn.Linear(30, 30, bias=False), nn.Linear(30, 30, bias=False)
    other = nn.Linear(30, 30, bias=False)
    other.weight = shared.weight
    flat = FlatModel(nn.Sequential(layer, layer, shared, other))
    factors = Factors(flat, torch.float32, flop_per_byte=18.0)
    factors.is_wanted = True
    flat.model(torch.randn(NUM_SAMPLES, 30)).square().sum().backward()
    collect_gradients(flat)
    whole, num_in_products = assembled(factors, 0, len(flat.gradients), flat.gradients)
    assert num_in_products == 900
    assert torch.allclose(whole, flat.gradients, rtol=1e-4, atol=1e-4)


def test_a_replica_that_comes_while_a_product_is_computed_gets_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        servers = servers_of(tmp_path, num_servers=1)
        await servers.begin()
        worker = await Worker.registered(servers, 0)
        described, size = await worker.described(), servers.ranges[0][1]
        product = Product(np.ones((1, size), np.float32), np.ones((1, 1), np.float32), 0, size)
        staged = asyncio.ensure_future(servers.lead.stage_product(described.id, 0, product))
        await asyncio.sleep(0)
        await servers.replicate(0)
        await staged
        await servers.lead.push(described.id, described)
        expected = await servers.pull(1)
        await servers.fail_over(0)
        await servers.begin()
        assert np.array_equal(await servers.pull(1), expected)

    check(scenario)


def test_a_server_and_its_replica_compute_the_product(tmp_path: Path) -> None:
    async def pushed(servers: LocalServers, gradients: Any, product: Product | None) -> Any:
        await servers.begin()
        await servers.replicate(0)
        worker = await Worker.registered(servers, 0)
        described = await worker.described()
        server, size = servers.lead, servers.ranges[0][1]
        if product is None:
            await server.stage(described.id, 0, gradients)
        else:
            await server.stage_product(described.id, 20, product)
            await server.stage(described.id, 0, gradients[:20])
            await server.stage(described.id, 50, gradients[50:size])
        await server.push(described.id, described)
        await servers.fail_over(0)
        await servers.begin()
        return await servers.pull(1)

    async def scenario() -> None:
        plain, other = (servers_of(tmp_path / name, num_servers=1) for name in ("a", "b"))
        generator = np.random.default_rng(0)
        gradients = generator.standard_normal(plain.ranges[0][1], np.float32)
        left = generator.standard_normal((2, 5), np.float32)
        right = generator.standard_normal((2, 7), np.float32)
        product = Product(left, right, 3, 33)
        gradients[20:50] = (left.T @ right).reshape(-1)[3:33]
        expected = await pushed(plain, gradients, None)
        assert np.allclose(await pushed(other, gradients, product), expected, atol=1e-6)

    check(scenario)
