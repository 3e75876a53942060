"""What Prometheus and metrics.jsonl see of a run.

Names are in base units; counters end in `_total`; no label has many values.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from datapipe.counters import ReadCounters
from xdist.stragglers import Straggler, StragglerLog, find_straggler, own_seconds
from xdist.worker_messages import WorkerReport

logger = logging.getLogger(__name__)

STALENESS_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
READ_COUNTERS: tuple[tuple[str, str, Callable[[ReadCounters], int]], ...] = (
    ("xdist_read_bytes", "Of shards, from storage", lambda read: read.bytes_read),
    ("xdist_reads", "Ranges of shards that storage delivered", lambda read: read.num_reads),
    ("xdist_read_retries", "Reads that failed and were made again", lambda read: read.num_retries),
    ("xdist_cache_hits", "Ranges found in the local cache", lambda read: read.num_cache_hits),
    ("xdist_cache_misses", "Ranges not found there", lambda read: read.num_cache_misses),
)
"""Name, help, and what is counted."""
TARGETS = "prometheus_targets.json"


class Metrics:
    """The driver's metrics, in a registry of their own."""

    def __init__(self, *, epoch_samples: int, num_workers: int) -> None:
        self.registry = registry = CollectorRegistry()
        self._straggler_log = StragglerLog()
        self.step = 0
        """Updates of the weights, as far as is known: what asynchronous workers report arrives in
        any order.
        """
        self.num_samples = 0
        """Places done, as far as is known."""
        self._epoch_samples = epoch_samples
        self._num_workers = num_workers
        self._num_recoveries = 0
        self._window: deque[tuple[float, int]] = deque(maxlen=2 * num_workers + 1)
        self._samples = Counter("xdist_samples", "Samples trained on", registry=registry)
        self._steps = Counter("xdist_steps", "Updates of the weights", registry=registry)
        self._dropped = Counter(
            "xdist_dropped_pushes", "Gradients that came too late", registry=registry
        )
        self._corrupt = Counter("xdist_corrupt_samples", "Samples not decoded", registry=registry)
        self._recoveries = Counter(
            "xdist_recoveries", "Faults, by what failed", ["cause"], registry=registry
        )
        self._step_seconds = Histogram(
            "xdist_step_seconds", "Time of a step", buckets=SECONDS_BUCKETS, registry=registry
        )
        self._data_wait = Counter(
            "xdist_data_wait_seconds", "Time that workers waited for data", registry=registry
        )
        self._read = [
            (Counter(name, text, registry=registry), value) for name, text, value in READ_COUNTERS
        ]
        self._staleness = Histogram(
            "xdist_gradient_staleness",
            "Commits between pull and push",
            buckets=STALENESS_BUCKETS,
            registry=registry,
        )
        self._loss = Gauge("xdist_loss", "Mean loss of the last report", registry=registry)
        self._rate = Gauge("xdist_samples_per_second", "Of all workers", registry=registry)
        self._learning_rate = Gauge("xdist_learning_rate", "Of the last update", registry=registry)
        self._workers = Gauge("xdist_workers", "Workers of the run", registry=registry)
        self._workers.set(num_workers)
        self._own_seconds = Gauge(
            "xdist_worker_step_seconds",
            "What a worker needs for its own part of a step",
            ["worker"],
            registry=registry,
        )
        self._straggler = Counter(
            "xdist_straggler_seconds",
            "Time that all others waited for this worker",
            ["worker"],
            registry=registry,
        )
        self._pause_seconds = Histogram(
            "xdist_group_pause_seconds",
            "Training stood still while a group formed",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self._score = Gauge("xdist_score", "Last score", ["weights", "measure"], registry=registry)
        self._checkpoint_seconds = Histogram(
            "xdist_checkpoint_seconds",
            "From when it was begun to write to the manifest",
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )

    def serve(self, host: str, directory: Path) -> str:
        """Serve on a free port of `host`; write the file that Prometheus' file_sd_configs reads.
        Returns the address.
        """
        self._server, self._thread = start_http_server(0, addr=host, registry=self.registry)
        address = f"{host}:{self._server.server_port}"
        partial = directory / f"{TARGETS}.partial"
        partial.write_text(json.dumps([{"targets": [address], "labels": {"job": "xdist"}}]))
        self._targets = partial.replace(directory / TARGETS)
        return address

    def close(self) -> None:
        """Stop serving; the file names nobody any more."""
        with suppress(OSError):  # Its disk may be away.
            self._targets.unlink()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def start_from(self, *, step: int, num_samples: int) -> None:
        """The run goes on from here, for the first time or again: what came later is void."""
        self.step, self.num_samples = step, num_samples
        self._window.clear()
        self._window.append((time.monotonic(), num_samples))

    def reach(self, *, step: int, num_samples: int) -> None:
        """The run has come so far, or farther."""
        self.step = max(self.step, step)
        self.num_samples = max(self.num_samples, num_samples)

    def reports(self, reports: Sequence[WorkerReport]) -> dict[str, Any]:
        """Observe a segment of one worker, or of all ranks together; return the `train` record."""
        newest = max((report.progress for report in reports), key=lambda progress: progress.step)
        self.reach(step=newest.step, num_samples=newest.num_samples)
        # Each rank of a group knows all of its samples; one may have made a step more than others.
        fullest = max(reports, key=lambda report: report.num_steps)
        num_samples, loss = fullest.num_samples, fullest.loss
        stale: collections.Counter[int] = collections.Counter()
        for report in reports:
            stale.update(report.staleness)
        staleness = sorted(stale.items())
        self._count(reports, fullest)
        straggler = self._compare(reports)
        rate = self._samples_per_s()
        self._rate.set(rate)
        self._learning_rate.set(newest.learning_rate)
        if num_samples:
            self._loss.set(loss)
        return {
            "kind": "train",
            "time": time.time(),
            "step": self.step,
            "samples": self.num_samples,
            "epoch": self.num_samples / self._epoch_samples,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN.
            "learning_rate": newest.learning_rate,
            "samples_per_s": rate,
            "step_s": sum(report.step_s for report in reports) / len(reports),
            "data_wait_s": sum(report.data_wait_s for report in reports) / len(reports),
            "num_workers": self._num_workers,
            "recoveries": self._num_recoveries,
            "worker_mib": max(report.memory.host_mib for report in reports),
            "gpu_mib": max((report.memory.gpu_mib or 0.0 for report in reports), default=0.0),
            "straggler": straggler.worker if straggler else None,
            "straggler_cost_s": straggler.cost_s if straggler else None,
            "staleness_mean": _mean(staleness),
            "staleness_max": max(stale, default=None),
            "staleness": {str(value): count for value, count in staleness},
        }

    def staff(self, num_workers: int) -> None:
        """So many workers train from now on."""
        self._num_workers = num_workers
        self._workers.set(num_workers)
        self._own_seconds.clear()  # Those who are there report soon.
        self._window = deque(self._window, maxlen=2 * num_workers + 1)

    def resize(self, num_workers: int, *, pause_s: float | None) -> None:
        """The same, after a pause if others had trained."""
        if pause_s is not None:
            self._pause_seconds.observe(pause_s)
        self.staff(num_workers)

    def recovery(self, cause: str) -> None:
        self._num_recoveries += 1
        self._recoveries.labels(cause).inc()

    def checkpoint(self, seconds: float) -> None:
        self._checkpoint_seconds.observe(seconds)

    def scores(self, weights: str, scores: dict[str, float]) -> None:
        for name, value in scores.items():
            self._score.labels(weights, name).set(value)

    def _compare(self, reports: Sequence[WorkerReport]) -> Straggler | None:
        """How the ranks of a group differ."""
        for report in reports:
            self._own_seconds.labels(report.worker).set(own_seconds(report))
        straggler = find_straggler(reports)
        num_steps = max(report.num_steps for report in reports)
        if straggler is not None:
            self._straggler.labels(straggler.worker).inc(straggler.cost_s * num_steps)
        if self._straggler_log.is_due(straggler, num_steps=num_steps):
            assert straggler is not None
            logger.warning(
                "worker %d on %s is slow step_s=%.3f others_s=%.3f data_wait_s=%.3f; "
                "each step takes %.3f s longer",
                straggler.worker,
                straggler.host,
                straggler.own_s,
                straggler.usual_s,
                straggler.data_wait_s,
                straggler.cost_s,
            )
        return straggler

    def _count(self, reports: Sequence[WorkerReport], fullest: WorkerReport) -> None:
        self._samples.inc(fullest.num_samples)
        self._steps.inc(fullest.num_steps - fullest.num_dropped)
        for _ in range(fullest.num_steps):
            self._step_seconds.observe(fullest.step_s / fullest.num_steps)
        for report in reports:
            self._dropped.inc(report.num_dropped)
            self._corrupt.inc(len(report.corrupt))
            self._data_wait.inc(report.data_wait_s)
            for counter, value in self._read:
                counter.inc(value(report.read))
            for staleness, count in report.staleness.items():
                for _ in range(count):
                    self._staleness.observe(staleness)

    def _samples_per_s(self) -> float:
        now = time.monotonic()
        then, samples_then = self._window[0]
        self._window.append((now, self.num_samples))
        return (self.num_samples - samples_then) / max(now - then, 1e-9)


def _mean(counts: Sequence[tuple[int, int]]) -> float | None:
    total = sum(count for _, count in counts)
    return sum(value * count for value, count in counts) / total if total else None
