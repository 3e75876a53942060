"""The estimate of how well an order shuffles, against all pairs of small epochs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from datapipe.order import SampleOrder
from datapipe.position import Span
from tests.benchmarks.displacement import Displacement, displacement

SAMPLES_PER_SHARD = 50


def all_pairs(order: SampleOrder) -> Displacement:
    """By looking at every pair of samples."""
    places = np.argsort(order.draw(Span(0, 0, order.num_samples)).sample_ids)
    pairs = np.array(list(combinations(range(order.num_samples), 2)))
    pairs = pairs[pairs[:, 0] // SAMPLES_PER_SHARD == pairs[:, 1] // SAMPLES_PER_SHARD]
    distances = np.abs(places[pairs[:, 0]] - places[pairs[:, 1]])
    is_next = pairs[:, 1] - pairs[:, 0] == 1
    shuffled = (order.num_samples + 1) / 3
    return Displacement(distances.mean() / shuffled, distances[is_next].mean() / shuffled)


def test_of_all_pools_it_is_that_of_all_pairs() -> None:
    order = SampleOrder(907, block_size=8, blocks_per_pool=4, seed=3)
    found = displacement(order, samples_per_shard=SAMPLES_PER_SHARD, num_pools=1000, seed=0)
    expected = all_pairs(order)
    assert found.of_shard == pytest.approx(expected.of_shard)
    assert found.of_neighbours == pytest.approx(expected.of_neighbours)


def test_of_a_quarter_of_the_pools_it_is_about_that() -> None:
    order = SampleOrder(3200, block_size=8, blocks_per_pool=4, seed=3)
    estimates = [
        displacement(order, samples_per_shard=SAMPLES_PER_SHARD, num_pools=25, seed=seed).of_shard
        for seed in range(30)
    ]
    # Estimates scatter by 0.1; the mean of thirty by 0.02.
    assert np.mean(estimates) == pytest.approx(all_pairs(order).of_shard, abs=0.04)


def test_an_order_that_does_not_shuffle_leaves_a_shard_together() -> None:
    order = SampleOrder(3200, block_size=8, blocks_per_pool=4, seed=3, shuffle=False)
    found = displacement(order, samples_per_shard=SAMPLES_PER_SHARD, num_pools=1000, seed=0)
    assert found.of_shard < 0.02
