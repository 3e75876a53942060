"""The order of samples: a permutation every epoch, computed anywhere in it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.hashing import key_of, splitmix64, uniforms
from datapipe.order import Permutation, SampleOrder
from datapipe.position import Span

orders = st.builds(
    SampleOrder,
    num_samples=st.integers(1, 300),
    block_size=st.integers(1, 40),
    blocks_per_pool=st.integers(1, 6),
    seed=st.integers(0, 2**63),
    shuffle=st.booleans(),
)
epochs = st.integers(0, 5)


@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_permutation_takes_every_value_once(size: int, key: int) -> None:
    permuted = Permutation(size, np.uint64(key))(np.arange(size, dtype=np.int64))
    assert sorted(permuted.tolist()) == list(range(size))


@given(orders, epochs)
def test_every_sample_has_one_place_an_epoch(order: SampleOrder, epoch: int) -> None:
    ids = order.sample_ids(Span(epoch, 0, order.num_samples))
    assert sorted(ids.tolist()) == list(range(order.num_samples))


@given(orders, epochs, st.data())
def test_any_span_is_that_part_of_the_epoch(
    order: SampleOrder, epoch: int, data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, order.num_samples))
    start = data.draw(st.integers(0, stop))
    whole = order.sample_ids(Span(epoch, 0, order.num_samples))
    assert np.array_equal(order.sample_ids(Span(epoch, start, stop)), whole[start:stop])


@given(orders, epochs)
def test_pools_cover_the_epoch_one_after_the_other(order: SampleOrder, epoch: int) -> None:
    place = 0
    while place < order.num_samples:
        pool = order.pool_at(epoch, place)
        assert pool.start == place < pool.stop
        assert order.pool_at(epoch, pool.stop - 1) == pool
        place = pool.stop
    assert place == order.num_samples


@given(orders, epochs)
def test_a_pool_reads_few_blocks(order: SampleOrder, epoch: int) -> None:
    pool = order.pool_at(epoch, 0)
    blocks = set((order.sample_ids(pool) // order.block_size).tolist())
    assert len(blocks) <= order.blocks_per_pool + 1


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = SampleOrder(1000, 16, 4, seed=1)
    other = SampleOrder(1000, 16, 4, seed=2)
    first = order.sample_ids(Span(0, 0, 1000))
    assert np.array_equal(first, order.sample_ids(Span(0, 0, 1000)))
    assert not np.array_equal(first, order.sample_ids(Span(1, 0, 1000)))
    assert not np.array_equal(first, other.sample_ids(Span(0, 0, 1000)))


def test_the_order_does_not_change_between_releases() -> None:
    ids = SampleOrder(100, 8, 2, seed=3).sample_ids(Span(1, 0, 8))
    assert ids.tolist() == [8, 15, 12, 37, 35, 9, 36, 11]


def test_blocks_land_all_over_the_epoch() -> None:
    order = SampleOrder(64_000, 64, 8, seed=0)
    ids = order.sample_ids(Span(0, 0, 64_000))
    place_of = np.empty(64_000, np.int64)
    place_of[ids] = np.arange(64_000)
    distance = np.abs(np.diff(place_of[::64])).mean()
    assert distance > 0.9 * 64_000 / 3  # a third of the length is what a uniform shuffle gives


def test_a_place_in_a_very_large_set_is_found_at_once() -> None:
    order = SampleOrder(350_000_000, 64, 8, seed=0)
    started = time.perf_counter()
    ids = order.sample_ids(Span(3, 300_000_000, 300_000_100))
    assert time.perf_counter() - started < 0.5
    assert len(set(ids.tolist())) == 100
    assert ids.max() < 350_000_000


def test_evaluation_keeps_the_order_of_the_shards() -> None:
    order = SampleOrder(50, 8, 2, seed=0, shuffle=False)
    assert order.sample_ids(Span(0, 10, 40)).tolist() == list(range(10, 40))


def test_an_empty_order_is_refused() -> None:
    with pytest.raises(ValueError, match="num_samples is 0; allowed: at least 1"):
        SampleOrder(0, 8, 2, seed=0)


def test_keys_are_the_hash_of_their_parts_and_draws_are_uniform() -> None:
    assert key_of(7) == splitmix64(np.array([7], np.uint64))[0]
    assert key_of(1, 2) != key_of(2, 1)
    draws = uniforms(splitmix64(np.arange(20_000, dtype=np.uint64)), num_draws=3)
    assert draws.min() >= 0
    assert draws.max() < 1
    # Standard error of the mean of 60,000 draws is 0.0012; of a correlation of 20,000 pairs, 0.007.
    assert abs(draws.mean() - 0.5) < 0.005
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
