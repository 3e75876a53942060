"""Ledger: which places of the sample sequence are done, which are leased to whom, and which are
free.

Promises: every place is leased to one worker at a time and becomes done exactly once, in the same
moment in which the push that covers it is committed. What a lost worker had leased is free again,
first in line, and its fencing token is refused from then on. Pure: no clock, no I/O; the state that
has to outlive a process is the `Position` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from datapipe.order import Order
from datapipe.position import Position, Span
from xdist.errors import LeaseLost


class Ledger:
    """Deals places to asynchronous workers until `num_places` are done, counted from the start of
    training.

    A lease is a pool or the rest of one. Towards the end of the run leases shrink, down to
    `batch_size`, so that no worker waits long for another's last lease. There is no barrier between
    epochs.
    """

    def __init__(
        self,
        position: Position,
        *,
        order: Order,
        num_places: int,
        batch_size: int,
        first_token: int = 0,
    ) -> None:
        """first_token: below all that this ledger gives."""
        self._position = position
        self._num_done = position.num_seen(order.num_samples)
        self._order = order
        self._num_places = num_places
        self._batch_size = batch_size
        self._free: deque[Span] = deque()
        self._next_epoch = position.epoch
        self._first_token = first_token
        self._tokens: dict[int, int] = {}
        self._leased: dict[int, list[Span]] = {}

    @property
    def position(self) -> Position:
        """What is done."""
        return self._position

    @property
    def num_done(self) -> int:
        """Places done since the start of training."""
        return self._num_done

    @property
    def is_finished(self) -> bool:
        """Whether every place of the run is done."""
        return self.num_done >= self._num_places

    @property
    def has_free(self) -> bool:
        """Whether there is a place to lease now: of the rest of the run, all may be leased."""
        return self._num_free > 0

    def register(self, worker: int) -> int:
        """Return a new fencing token for `worker`; what its predecessor had leased is free."""
        return self.release(worker)

    def release(self, worker: int) -> int:
        """`worker` is lost: refuse its token, and free what it had leased, first in line. Returns
        the token of whoever replaces it.
        """
        self._tokens[worker] = self._tokens.get(worker, self._first_token) + 1
        self._free.extendleft(reversed(self._leased.get(worker, [])))
        self._leased[worker] = []
        return self._tokens[worker]

    def token(self, worker: int) -> int | None:
        """The worker's newest token; None before the first."""
        return self._tokens.get(worker)

    def is_current(self, worker: int, token: int | None) -> bool:
        """Whether this is the worker's newest token."""
        return self._tokens.get(worker) == token

    def has_leased(self, worker: int) -> bool:
        """Whether it has places that are not done."""
        return bool(self._leased.get(worker))

    def lease(self, worker: int, token: int) -> Span | None:
        """Lease the next places to `worker`; None when none is free. Raises `LeaseLost`."""
        self.check(worker, token)
        span = self._take() if self.has_free else None
        if span is not None:
            self._leased[worker].append(span)
        return span

    def commit(self, worker: int, spans: Sequence[Span]) -> None:
        """Mark places that `worker` has leased as done."""
        self._leased[worker] = subtract(self._leased[worker], spans)
        self.complete(spans)

    def complete(self, spans: Sequence[Span]) -> None:
        """Mark places that nobody here has leased as done."""
        self._position = self._position.with_done(spans, num_samples=self._order.num_samples)
        self._num_done += sum(span.num_samples for span in spans)

    def give_back(self, worker: int, spans: Sequence[Span]) -> None:
        """Free places that `worker` has leased and did not get done, first in line."""
        self._leased[worker] = subtract(self._leased[worker], spans)
        self._free.extendleft(reversed(spans))

    def check(self, worker: int, token: int | None) -> None:
        """Raise `LeaseLost` unless this is the worker's newest token."""
        if not self.is_current(worker, token):
            raise LeaseLost(
                f"worker {worker} holds token {token}, current is {self._tokens.get(worker)}; "
                "it was replaced"
            )

    @property
    def _num_free(self) -> int:
        leased = sum(span.num_samples for spans in self._leased.values() for span in spans)
        return self._num_places - self.num_done - leased

    def _take(self) -> Span:
        while not self._free:
            self._open_next_epoch()
        span = self._free.popleft()
        pool = self._order.pool_at(span.epoch, span.start)
        stop = min(span.stop, pool.stop, span.start + self._largest_lease())
        if stop < span.stop:
            self._free.appendleft(Span(span.epoch, stop, span.stop))
        return Span(span.epoch, span.start, stop)

    def _open_next_epoch(self) -> None:
        num_samples = self._order.num_samples
        self._free.extend(self._position.remaining(self._next_epoch, num_samples=num_samples))
        self._next_epoch += 1

    def _largest_lease(self) -> int:
        batches = self._num_free // (2 * len(self._tokens) * self._batch_size)
        return min(self._num_free, max(1, batches) * self._batch_size)


def subtract(leases: Iterable[Span], spans: Sequence[Span]) -> list[Span]:
    """What is left of `leases` without `spans`; each span lies within one lease (`ValueError`
    otherwise).
    """
    left = list(leases)
    for span in spans:
        for number, lease in enumerate(left):
            if lease.epoch == span.epoch and lease.start <= span.start and span.stop <= lease.stop:
                pieces = (
                    Span(lease.epoch, lease.start, span.start),
                    Span(lease.epoch, span.stop, lease.stop),
                )
                left[number : number + 1] = [piece for piece in pieces if piece.num_samples]
                break
        else:
            raise ValueError(f"{span} is not leased to the worker that commits it")
    return left
