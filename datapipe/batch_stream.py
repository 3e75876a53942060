"""BatchStream: batches, decoded ahead of the step that uses them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from datapipe.assembly import BatchMaker, PendingBatch
from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.errors import CorruptSample, TooManyBadSamples
from datapipe.index import ShardIndex
from datapipe.order import Order
from datapipe.plan import BatchPlan
from datapipe.planned_samples import DrawnSample, PlannedSamples, Rows


class BatchStream:
    """An iterator of batches of given samples, in that order.

    What a batch holds is a function of (configuration, seed, its samples) alone, to the bit. A
    thread reads samples and hands them to `decode_threads` others; at most `prefetch_batches`
    batches wait.

    `next` raises what went wrong in a thread, in its place in the sequence: `LabelOutOfRange`,
    `TooManyBadSamples`, or what `samples` raised. After that, and after `close`, the stream is at
    its end. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        samples: Iterable[tuple[BatchPlan, Rows]],
        config: DataConfig,
        *,
        seed: int,
        training: bool,
        num_classes: int,
        num_bad_allowed: int,
        stand_ins: Callable[[], Iterable[DrawnSample]],
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """stand_ins: samples of which the first good one fills a batch that has none. on_close:
        called when the stream is at its end, perhaps more than once.
        """
        self.corrupt: dict[tuple[str, str, int], CorruptSample] = {}
        """The samples that could not be used so far, each once: by shard, key and offset."""
        self._num_bad_allowed = num_bad_allowed
        self._samples = samples
        self._on_close = on_close
        self._executor = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._maker = BatchMaker(
            config,
            seed=seed,
            training=training,
            num_classes=num_classes,
            executor=self._executor,
            stand_ins=stand_ins,
            num_bad_allowed=num_bad_allowed,
        )
        self._ready: queue.SimpleQueue[PendingBatch | BaseException | None] = queue.SimpleQueue()
        self._free_places = threading.Semaphore(config.prefetch_batches)
        self._closed = threading.Event()
        self._producer = threading.Thread(target=self._produce, name="read", daemon=True)
        self._producer.start()

    @classmethod
    def of_plans(
        cls,
        index: ShardIndex,
        config: DataConfig,
        plans: Iterable[BatchPlan],
        *,
        order: Order,
        training: bool,
        num_classes: int,
    ) -> Self:
        """The batches that `plans` names.

        Of what reading raises, besides: `MissingShard`, `UnreadableUrl`, `BadIndex`.
        """
        samples = PlannedSamples(index, order, config)
        return cls(
            samples.of_plans(plans),
            config,
            seed=order.seed,
            training=training,
            num_classes=num_classes,
            num_bad_allowed=config.bad_samples_allowed(index.num_samples),
            stand_ins=samples.in_order,
            on_close=samples.close,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if not isinstance(item, PendingBatch):
            self.close()
            raise item if item is not None else StopIteration
        try:
            batch = self._maker.finish(item)
        except CancelledError:  # another thread closed the stream
            raise StopIteration from None
        except BaseException:
            self.close()
            raise
        self._free_places.release()
        self._count_corrupt(batch)
        return batch

    def close(self) -> None:
        """End the threads. A `plans` that blocks keeps its own thread until it goes on."""
        self._closed.set()
        if self._on_close is not None:
            self._on_close()
        self._free_places.release()
        self._ready.put(None)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _count_corrupt(self, batch: Batch) -> None:
        for sample in batch.corrupt:
            self.corrupt.setdefault((sample.shard, sample.key, sample.offset), sample)
        if len(self.corrupt) > self._num_bad_allowed:
            self.close()
            raise TooManyBadSamples(tuple(self.corrupt.values()), self._num_bad_allowed)

    def _produce(self) -> None:
        last: BaseException | None = None
        try:
            for plan, samples in self._samples:
                self._free_places.acquire()
                if self._closed.is_set():
                    return
                self._ready.put(self._maker.start(plan, samples))
        except BaseException as error:  # noqa: BLE001 - it is raised again by `next`
            last = error
        finally:
            self._ready.put(last)
