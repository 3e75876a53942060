"""Ledger: which places of the sample sequence are done, which are leased to whom, and which are
free.

Promises: every place is leased to one worker at a time and becomes done exactly once, in the same
moment in which the push that covers it is committed. A worker that is replaced hands its unfinished
leases to its successor, and its own fencing token is refused from then on. Pure: no clock, no I/O;
the state that has to outlive a process is the `Position` alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from datapipe.order import SampleOrder
from datapipe.position import Position, Span
from xdist.errors import LeaseLost


class Ledger:
    """Deals the places up to `num_places` (counted from the start of training) to asynchronous
    workers.

    A lease is a pool or the rest of one. Towards the end of the run leases shrink, down to
    `batch_size`, so that no worker waits long for another's last lease. There is no barrier between
    epochs.
    """

    def __init__(
        self, position: Position, *, order: SampleOrder, num_places: int, batch_size: int
    ) -> None:
        self._position = position
        self._order = order
        self._num_places = num_places
        self._batch_size = batch_size
        self._free: deque[Span] = deque()
        self._next_epoch = position.epoch
        self._tokens: dict[int, int] = {}
        self._sequences: dict[int, int] = {}
        self._leased: dict[int, list[Span]] = {}
        self._inherited: dict[int, deque[Span]] = {}

    @property
    def position(self) -> Position:
        """What is done."""
        return self._position

    @property
    def num_done(self) -> int:
        """Places done since the start of training."""
        return self._position.num_seen(self._order.num_samples)

    @property
    def is_finished(self) -> bool:
        """Whether every place of the run is done."""
        return self.num_done >= self._num_places

    def register(self, worker: int) -> int:
        """Return a new fencing token for `worker`; what its predecessor had leased goes on under
        it.
        """
        self._tokens[worker] = self._tokens.get(worker, 0) + 1
        self._sequences[worker] = 0
        left = self._inherited.get(worker, deque())
        self._inherited[worker] = deque([*self._leased.get(worker, []), *left])
        self._leased[worker] = []
        return self._tokens[worker]

    def lease(self, worker: int, token: int) -> Span | None:
        """Lease the next places to `worker`; None when nothing is left for it. Raises
        `LeaseLost`.
        """
        self._check(worker, token)
        inherited = self._inherited[worker]
        span = inherited.popleft() if inherited else self._take()
        if span is not None:
            self._leased[worker].append(span)
        return span

    def commit(self, worker: int, token: int, sequence: int, spans: Sequence[Span]) -> None:
        """Mark the places of push number `sequence` of `worker` as done. Raises `LeaseLost`."""
        self._check(worker, token)
        if sequence != self._sequences[worker] + 1:
            raise LeaseLost(
                f"worker {worker} committed push {sequence} after push {self._sequences[worker]}; "
                "a push is committed once, and in order"
            )
        self._leased[worker] = subtract(self._leased[worker], spans)
        self._position = self._position.with_done(spans, num_samples=self._order.num_samples)
        self._sequences[worker] = sequence

    def _check(self, worker: int, token: int) -> None:
        current = self._tokens.get(worker)
        if token != current:
            raise LeaseLost(
                f"worker {worker} holds token {token}, current is {current}; it was replaced"
            )

    def _take(self) -> Span | None:
        while not self._free and self._open_next_epoch():
            pass
        if not self._free:
            return None
        span = self._free.popleft()
        pool = self._order.pool_at(span.epoch, span.start)
        stop = min(span.stop, pool.stop, span.start + self._largest_lease())
        if stop < span.stop:
            self._free.appendleft(Span(span.epoch, stop, span.stop))
        return Span(span.epoch, span.start, stop)

    def _open_next_epoch(self) -> bool:
        num_samples = self._order.num_samples
        epoch = self._next_epoch
        end = self._num_places - epoch * num_samples
        if end <= 0:
            return False
        self._next_epoch += 1
        for span in self._position.remaining(epoch, num_samples=num_samples):
            if span.start < end:
                self._free.append(Span(epoch, span.start, min(span.stop, end)))
        return True

    def _largest_lease(self) -> int:
        leased = sum(span.num_samples for spans in self._leased.values() for span in spans)
        left = self._num_places - self.num_done - leased
        batches = left // (2 * len(self._tokens) * self._batch_size)
        return max(1, batches) * self._batch_size


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
