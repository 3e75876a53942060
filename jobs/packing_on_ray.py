"""Packing shards on every node of a Ray cluster: one task a shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from datapipe.errors import DataError, PackingError
from datapipe.parallel_packing import OnImages
from datapipe.shard_packing import ShardJob, ShardRecord, pack_shard
from xdist.connection import connect

TASKS_PER_CPU = 2
"""That are handed out at a time: a node has its next shard at hand, and jobs do not pile up."""
MAX_RETRIES = 3
"""Of a shard whose node was lost. Writing one twice gives the same bytes."""


def pack_shards_on_ray(jobs: Sequence[ShardJob], *, on_images: OnImages) -> Iterator[ShardRecord]:
    """Do all jobs on the cluster, and give their records as they come.

    `on_images` is called with the number of a shard's images once that is done. Errors: those of
    `pack_shard`, the first that is met; `PackingError` if a shard's node was lost time and again.
    """
    connect()
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")(pack_shard)
    limit = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    upcoming = iter(jobs)
    running: dict[Any, ShardJob] = {}
    while True:
        running |= {task.remote(job): job for job in islice(upcoming, limit - len(running))}
        if not running:
            return
        done, _ = ray.wait(list(running))
        for reference in done:
            record = _result(reference)
            on_images(len(running.pop(reference).planned.images))
            yield record


def _result(reference: Any) -> ShardRecord:
    try:
        record: ShardRecord = ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, DataError | OSError) else error from None
    except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
        raise PackingError(
            f"a packing task was lost {MAX_RETRIES + 1} times: {error}; the same command goes on"
        ) from error
    return record
