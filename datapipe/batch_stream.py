"""BatchStream: batches, decoded ahead of the step that uses them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

import torch

from datapipe.antialiasing import work_alone
from datapipe.assembly import BatchMaker, PendingBatch
from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.counters import ReadCounters, StreamCounters
from datapipe.decode import active_kernel
from datapipe.errors import CorruptSample, TooManyBadSamples
from datapipe.index import ShardIndex
from datapipe.order import Order
from datapipe.plan import BatchPlan
from datapipe.planned_samples import DrawnSample, PlannedSamples, Rows

JOIN_LIMIT_S = 1.0


def _decode_threads(num_threads: int) -> ThreadPoolExecutor:
    name = "decode"
    if active_kernel().name == "native":
        return ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    return ThreadPoolExecutor(
        num_threads, name, initializer=work_alone, initargs=(torch.get_num_threads(),)
    )


class SampleSource(Protocol):
    """Where the samples of batches come from."""

    def in_order(self) -> Iterable[DrawnSample]:
        """Samples of which the first good one fills a batch that has none."""

    def counters(self) -> ReadCounters:
        """What was read so far; for any thread."""

    def close(self) -> None:
        """End its threads; perhaps called more than once, and by another thread."""


class BatchStream:
    """An iterator of batches of given samples, in that order.

    What a batch holds is a function of (configuration, seed, its samples) alone, to the bit. A
    thread reads samples and hands them to `decode_threads` others; at most `prefetch_batches`
    batches wait.

    `next` raises what went wrong in a thread, in its place in the sequence: `LabelOutOfRange`,
    `TooManyBadSamples`, or what `batches` raised. After that, and after `close`, the stream is at
    its end. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        batches: Iterable[tuple[BatchPlan, Rows]],
        config: DataConfig,
        source: SampleSource,
        *,
        seed: int,
        training: bool,
        num_classes: int,
        num_bad_allowed: int,
    ) -> None:
        """batches: the samples of each batch; they are drawn from `source`."""
        self.corrupt: dict[tuple[str, str, int], CorruptSample] = {}
        """The samples that could not be used so far, each once: by shard, key and offset."""
        self._num_bad_allowed = num_bad_allowed
        self._batches = batches
        self._source = source
        self._counters = StreamCounters()
        self._executor = _decode_threads(config.decode_threads)
        self._maker = BatchMaker(
            config,
            seed=seed,
            training=training,
            num_classes=num_classes,
            executor=self._executor,
            stand_ins=source.in_order,
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
            samples,
            seed=order.seed,
            training=training,
            num_classes=num_classes,
            num_bad_allowed=config.bad_samples_allowed(index.num_samples),
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
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
        self._check_corrupt(batch)
        return self._counted(batch, time.perf_counter() - started)

    def counters(self) -> StreamCounters:
        """What this stream has given so far."""
        return self._counters

    def _counted(self, batch: Batch, data_wait_s: float) -> Batch:
        before, read = self._counters, self._source.counters()
        self._counters = StreamCounters(
            num_batches=before.num_batches + 1,
            num_samples=before.num_samples + batch.num_samples,
            num_corrupt=before.num_corrupt + len(batch.corrupt),
            data_wait_s=before.data_wait_s + data_wait_s,
            read=read,
        )
        return replace(batch, read=read - before.read)

    def close(self) -> None:
        """End the threads. Where `batches` blocks, its thread goes on until it does not.

        That thread is waited for: at the interpreter's end, one that gave back a tensor would end
        the process with SIGABRT.
        """
        is_first = not self._closed.is_set()
        self._closed.set()
        self._source.close()
        self._free_places.release()
        self._ready.put(None)
        self._executor.shutdown(wait=False, cancel_futures=True)
        if is_first:
            self._producer.join(JOIN_LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_corrupt(self, batch: Batch) -> None:
        for sample in batch.corrupt:
            self.corrupt.setdefault((sample.shard, sample.key, sample.offset), sample)
        if len(self.corrupt) > self._num_bad_allowed:
            self.close()
            raise TooManyBadSamples(tuple(self.corrupt.values()), self._num_bad_allowed)

    def _produce(self) -> None:
        last: BaseException | None = None
        try:
            for plan, samples in self._batches:
                self._free_places.acquire()
                if self._closed.is_set():
                    return
                self._ready.put(self._maker.start(plan, samples))
        except BaseException as error:  # noqa: BLE001 - it is raised again by `next`
            last = error
        finally:
            self._ready.put(last)
