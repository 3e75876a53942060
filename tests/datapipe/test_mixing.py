"""Mixtures: every source once an epoch of its own, in proportion, from any place on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.mixing import TOTAL_SHARE, MixedOrder, deal_slots, shares_of
from datapipe.order import Drawn
from datapipe.position import Span

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@st.composite
def orders(draw: st.DrawFn) -> MixedOrder:
    sizes = draw(SIZES)
    weights = draw(st.lists(st.floats(0.05, 5), min_size=len(sizes), max_size=len(sizes)))
    return MixedOrder(
        tuple(sizes),
        shares_of(sizes, draw(st.sampled_from([weights, []]))),
        block_size=draw(st.integers(1, 7)),
        blocks_per_pool=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 99)),
    )


def of_first_places(order: MixedOrder, num_places: int) -> Drawn:
    parts = []
    for epoch in range(-(-num_places // order.num_samples)):
        stop = min(order.num_samples, num_places - epoch * order.num_samples)
        parts.append(order.draw(Span(epoch, 0, stop)))
    return Drawn.joined(parts)


@given(order=orders(), num_pools=st.integers(1, 12))
def test_each_source_gives_every_sample_once_in_each_of_its_epochs(
    order: MixedOrder, num_pools: int
) -> None:
    """At the end of every pool, each source has given the first places of its endless run."""
    drawn = of_first_places(order, num_pools * order.block_size * order.blocks_per_pool)
    first = 0
    for size in order.sizes:
        is_of_source = (drawn.sample_ids >= first) & (drawn.sample_ids < first + size)
        ids, epochs = drawn.sample_ids[is_of_source], drawn.epochs[is_of_source]
        assert len(set(zip(ids.tolist(), epochs.tolist(), strict=True))) == ids.size
        counts = Counter(epochs.tolist())
        full, rest = divmod(ids.size, size)
        assert counts == {**dict.fromkeys(range(full), size), **({full: rest} if rest else {})}
        first += size


@given(order=orders(), data=st.data())
def test_places_give_the_same_samples_however_they_are_asked_for(
    order: MixedOrder, data: st.DataObject
) -> None:
    epoch = data.draw(st.integers(0, 3))
    start = data.draw(st.integers(0, order.num_samples - 1))
    stop = data.draw(st.integers(start + 1, order.num_samples))
    whole = order.draw(Span(epoch, 0, order.num_samples))[start:stop]
    part = order.draw(Span(epoch, start, stop))
    assert part.sample_ids.tolist() == whole.sample_ids.tolist()
    assert part.epochs.tolist() == whole.epochs.tolist()


@given(order=orders(), epoch=st.integers(0, 3))
def test_pools_tile_an_epoch(order: MixedOrder, epoch: int) -> None:
    place = 0
    while place < order.num_samples:
        pool = order.pool_at(epoch, place)
        assert pool.start == place
        assert order.pool_at(epoch, pool.stop - 1) == pool
        place = pool.stop
    assert place == order.num_samples


@given(order=orders())
def test_a_slot_of_the_first_epoch_is_one_block_of_the_numbering(order: MixedOrder) -> None:
    """As long as a source gives full blocks, each of its slots is what one ranged read fetches."""
    order = replace(order, blocks_per_pool=1)
    given = [0] * len(order.sizes)
    starts = np.cumsum([0, *order.sizes])
    for pool in range(order.num_samples // order.block_size):
        start = pool * order.block_size
        drawn = order.draw(Span(0, start, start + order.block_size))
        (source,) = set(np.searchsorted(starts, drawn.sample_ids, side="right") - 1)
        given[source] += order.block_size
        before = min(-int(starts[source]) % order.block_size, order.sizes[source])
        full = (order.sizes[source] - before) // order.block_size * order.block_size
        if given[source] <= full:
            assert len(set(drawn.sample_ids // order.block_size)) == 1


@settings(max_examples=50)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), seed=st.integers(0, 9))
def test_slots_are_dealt_in_proportion_at_every_moment(weights: list[float], seed: int) -> None:
    shares = shares_of([1] * len(weights), weights)
    sources, numbers = deal_slots(np.arange(500, dtype=np.int64), shares, seed=seed)
    for source, share in enumerate(shares):
        counts = np.cumsum(sources == source)
        expected = np.arange(1, 501) * share / TOTAL_SHARE
        assert np.abs(counts - expected).max() < len(shares) + 1
        assert numbers[sources == source].tolist() == list(range(counts[-1]))


@given(sizes=SIZES)
def test_shares_are_the_sizes_by_default(sizes: list[int]) -> None:
    shares = shares_of(sizes, ())
    assert sum(shares) == TOTAL_SHARE
    assert min(shares) >= 1
    assert np.allclose(np.array(shares) / TOTAL_SHARE, np.array(sizes) / sum(sizes), atol=1e-5)


def test_a_weight_may_be_tiny() -> None:
    assert shares_of([10, 10], [1e-12, 1.0]) == (1, TOTAL_SHARE - 1)


def test_far_places_cost_nothing() -> None:
    order = MixedOrder((300_000_000, 50_000_000), shares_of([1, 1], [3, 1]), 64, 8, seed=1)
    drawn = order.draw(Span(80, 299_999_000, 299_999_400))
    assert len(set(drawn.sample_ids.tolist())) == 400
    of_second = drawn.sample_ids >= 300_000_000
    assert 0.1 < of_second.mean() < 0.4
    assert set(drawn.epochs[of_second].tolist()) <= {141, 142, 140}


@pytest.mark.parametrize(
    ("sizes", "shares"), [((), ()), ((3,), (1, 2)), ((0,), (TOTAL_SHARE,)), ((3, 4), (5, 5))]
)
def test_impossible_mixtures_are_refused(sizes: tuple[int, ...], shares: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shares"):
        MixedOrder(sizes, shares, 4, 2, seed=0)
