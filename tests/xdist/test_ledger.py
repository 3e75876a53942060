"""The ledger deals every place once, whatever happens to the workers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.order import SampleOrder
from datapipe.plan import leased_batches
from datapipe.position import Position, Span
from xdist.errors import LeaseLost
from xdist.ledger import Ledger, subtract


def make_ledger(
    *, num_samples: int = 50, num_places: int = 100, position: Position | None = None
) -> Ledger:
    order = SampleOrder(num_samples, block_size=4, blocks_per_pool=2, seed=0)
    start = position or Position()
    return Ledger(start, order=order, num_places=num_places, batch_size=3)


def commit_all(ledger: Ledger, worker: int) -> None:
    """Let one worker do all that is left."""
    token = ledger.register(worker)
    spans = iter(lambda: ledger.lease(worker, token), None)
    for plan in leased_batches(spans, batch_size=3):
        ledger.commit(worker, plan.spans)


def test_one_worker_finishes_the_run() -> None:
    ledger = make_ledger()
    commit_all(ledger, 0)
    assert ledger.is_finished
    assert ledger.position == Position(epoch=2)


def test_the_run_ends_in_the_middle_of_an_epoch() -> None:
    ledger = make_ledger(num_places=61)
    commit_all(ledger, 0)
    assert ledger.is_finished
    assert ledger.position == Position(epoch=1, done=((0, 11),))


def test_what_was_done_before_is_not_leased() -> None:
    ledger = make_ledger(position=Position(epoch=0, done=((5, 20), (55, 60))))
    token = ledger.register(0)
    spans = list(iter(lambda: ledger.lease(0, token), None))
    places = {span.epoch * 50 + place for span in spans for place in range(span.start, span.stop)}
    assert places == set(range(100)) - set(range(5, 20)) - set(range(55, 60))


def test_a_lease_stays_in_one_pool_and_epoch() -> None:
    ledger = make_ledger(num_places=200)
    order = SampleOrder(50, block_size=4, blocks_per_pool=2, seed=0)
    token = ledger.register(0)
    for span in iter(lambda: ledger.lease(0, token), None):
        pool = order.pool_at(span.epoch, span.start)
        assert pool.start <= span.start < span.stop <= pool.stop


def test_leases_shrink_to_a_batch_at_the_end() -> None:
    ledger = make_ledger(num_samples=64, num_places=64)
    tokens = [ledger.register(worker) for worker in range(4)]
    sizes = [
        span.num_samples
        for span in iter(lambda: ledger.lease(0, tokens[0]), None)
    ]  # fmt: skip
    assert sizes[0] > 3
    assert sizes[-1] <= 3


def test_a_successor_goes_on_with_the_lease() -> None:
    ledger = make_ledger()
    token = ledger.register(0)
    span = ledger.lease(0, token)
    assert span is not None
    ledger.commit(0, [Span(span.epoch, span.start, span.start + 2)])
    token = ledger.register(0)
    assert ledger.lease(0, token) == Span(span.epoch, span.start + 2, span.stop)


def test_a_replaced_worker_is_refused_and_changes_nothing() -> None:
    ledger = make_ledger()
    old = ledger.register(0)
    span = ledger.lease(0, old)
    assert span is not None
    ledger.register(0)
    before = ledger.position
    with pytest.raises(LeaseLost, match="token 1, current is 2"):
        ledger.check(0, old)
    with pytest.raises(LeaseLost, match="replaced"):
        ledger.lease(0, old)
    assert ledger.position == before


def test_places_that_are_given_back_are_the_next_ones() -> None:
    ledger = make_ledger()
    token = ledger.register(0)
    first, second = ledger.lease(0, token), ledger.lease(0, token)
    assert first is not None
    assert second is not None
    ledger.give_back(0, [first])
    other = ledger.register(1)
    assert ledger.lease(1, other) == first
    ledger.commit(0, [second])
    ledger.commit(1, [first])


def test_tokens_of_a_new_ledger_are_above_those_before() -> None:
    order = SampleOrder(50, block_size=4, blocks_per_pool=2, seed=0)
    ledger = Ledger(Position(), order=order, num_places=50, batch_size=3, first_token=100)
    assert ledger.register(7) > 100


def test_places_of_others_cannot_be_committed() -> None:
    with pytest.raises(ValueError, match="not leased"):
        subtract([Span(0, 0, 4)], [Span(0, 2, 6)])


def test_places_of_a_lost_worker_are_the_next_ones() -> None:
    ledger = make_ledger()
    lost, other = ledger.register(0), ledger.register(1)
    leased = [ledger.lease(0, lost), ledger.lease(0, lost)]
    ledger.release(0)
    assert [ledger.lease(1, other), ledger.lease(1, other)] == leased
    assert not ledger.is_current(0, lost)


def test_when_all_is_leased_nothing_is_free_until_a_worker_is_lost() -> None:
    ledger = make_ledger()
    lost, other = ledger.register(0), ledger.register(1)
    while ledger.lease(0, lost) is not None:
        pass
    assert not ledger.has_free
    assert ledger.lease(1, other) is None
    assert not ledger.is_finished
    ledger.release(0)
    assert ledger.has_free


@st.composite
def positions(draw: st.DrawFn, *, num_samples: int) -> Position:
    """What lanes, or a run that was meant to be longer, may leave behind."""
    edges = draw(st.lists(st.integers(0, 2 * num_samples), max_size=8, unique=True).map(sorted))
    spans = [
        Span(start // num_samples, start % num_samples, start % num_samples + stop - start)
        for start, stop in zip(edges[::2], edges[1::2], strict=False)
        if start % num_samples + stop - start <= num_samples
    ]
    return Position().with_done(spans, num_samples=num_samples)


@settings(derandomize=True, deadline=None)
@given(
    data=st.data(),
    num_samples=st.integers(1, 120),
    num_workers=st.integers(1, 5),
    seed=st.integers(0, 1 << 16),
)
def test_every_place_is_done_once_with_workers_that_die_at_random(
    data: st.DataObject, num_samples: int, num_workers: int, seed: int
) -> None:
    chance = random.Random(seed)
    start = data.draw(positions(num_samples=num_samples))
    seen = start.num_seen(num_samples)
    num_places = data.draw(st.integers(seen + 1, seen + 3 * num_samples))
    ledger = make_ledger(num_samples=num_samples, num_places=num_places, position=start)
    tokens = {worker: ledger.register(worker) for worker in range(num_workers)}
    held: dict[int, list[Span]] = {worker: [] for worker in tokens}
    num_done = seen
    for _ in range(20 * num_places + 100):
        worker = chance.randrange(num_workers)
        if chance.random() < 0.1:
            ledger.release(worker)
            tokens[worker] = ledger.register(worker)
            held[worker] = []
            continue
        if not held[worker]:
            span = ledger.lease(worker, tokens[worker])
            held[worker] = [] if span is None else [span]
            continue
        span = held[worker].pop()
        cut = min(span.stop, span.start + chance.randint(1, 3))
        if chance.random() < 0.1:
            ledger.give_back(worker, [span])
            continue
        ledger.commit(worker, [Span(span.epoch, span.start, cut)])
        num_done += cut - span.start
        if cut < span.stop:
            held[worker].append(Span(span.epoch, cut, span.stop))
    assert ledger.is_finished
    assert num_done == ledger.num_done == num_places
