"""Whom a group waits for, and when that is said."""

from __future__ import annotations

import json
import logging
import platform
import statistics
import threading
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from datapipe.batch import Batch
from datapipe.counters import ReadCounters
from tests.small_runs import records, run, small_config
from tests.strategies import ActsBefore, Wrapped
from xdist.peak_memory import PeakMemory
from xdist.stragglers import Straggler, StragglerLog, find_straggler, own_seconds
from xdist.strategies import Progress
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.worker_messages import WorkerReport

SLOWER_S = 0.3


def report_of(worker: int, *, own_s: float, data_wait_s: float = 0.0) -> WorkerReport:
    """Ten steps of half a second, of which the worker itself needs `own_s` each."""
    return WorkerReport(
        worker=worker,
        host="host",
        progress=Progress(10, 10, 80, 0.5),
        num_steps=10,
        num_dropped=0,
        num_samples=80,
        num_images=40,
        loss=1.0,
        step_s=5.0,
        data_wait_s=data_wait_s,
        peer_wait_s=5.0 - 10 * own_s,
        standing_s=0.0,
        memory=PeakMemory(400.0, None),
        read=ReadCounters(),
        staleness={},
        corrupt=(),
        written=None,
        is_final=False,
        interrupted=None,
    )


def test_the_slowest_is_named_with_what_it_costs_and_what_it_waits_for() -> None:
    reports = [report_of(0, own_s=0.3), report_of(1, own_s=0.5, data_wait_s=2.0)]
    reports.append(report_of(2, own_s=0.31))
    found = find_straggler(reports)
    assert found is not None
    assert found.worker == 1
    assert found.cost_s == pytest.approx(0.5 - 0.305)
    assert found.data_wait_s == pytest.approx(0.2)
    assert own_seconds(reports[0]) == pytest.approx(0.3)


@pytest.mark.parametrize("own_s", [(0.3, 0.35), (0.001, 0.004), (0.4,)])
def test_small_differences_and_lone_workers_are_none(own_s: tuple[float, ...]) -> None:
    assert find_straggler([report_of(i, own_s=value) for i, value in enumerate(own_s)]) is None


def test_who_has_more_images_than_others_may_take_longer() -> None:
    fast, more = report_of(0, own_s=0.2), replace(report_of(1, own_s=0.3), num_images=60)
    assert find_straggler([fast, more]) is None
    found = find_straggler([fast, replace(more, num_images=50)])
    assert found is not None
    assert found.cost_s == pytest.approx(0.3 - 0.25)


def test_it_is_said_after_seconds_of_waiting_and_then_when_these_have_doubled() -> None:
    log = StragglerLog()
    slow = Straggler(3, "host", own_s=0.3, usual_s=0.1, data_wait_s=0.0)
    said = [log.is_due(slow, num_steps=10) for _ in range(12)]  # Two seconds each.
    assert [number for number, is_due in enumerate(said, 1) if is_due] == [3, 6, 12]


def test_another_straggler_or_none_begins_anew() -> None:
    log = StragglerLog()
    slow = Straggler(3, "host", own_s=0.3, usual_s=0.1, data_wait_s=0.0)
    other = Straggler(2, "host", own_s=0.3, usual_s=0.1, data_wait_s=0.0)
    said = [log.is_due(found, num_steps=20) for found in (slow, other, slow, None, slow, slow)]
    assert said == [False, False, False, False, False, True]


class Slow(Wrapped):
    """A strategy whose worker is slow, as on a machine that others use too."""

    def loss_divisor(self, batch: Batch) -> float:
        threading.Event().wait(SLOWER_S)
        divisor: float = self.strategy.loss_divisor(batch)
        return divisor


def one_is_slow(run_dir: Path, *arguments: Any, **named: Any) -> Any:
    """Worker 1 of two; the other one reads the run's metrics before its 25th update."""
    strategy = all_reduce_strategy(*arguments, **named)
    if named["number"] == 1:
        return Slow(strategy)
    return ActsBefore(strategy, 25, run_dir / "scraped", partial(scrape, run_dir))


def scrape(run_dir: Path) -> None:
    """Read the metrics of a run as Prometheus does, into a file."""
    [group] = json.loads((run_dir / "prometheus_targets.json").read_text())
    with urllib.request.urlopen(f"http://{group['targets'][0]}/metrics") as answer:
        (run_dir / "scraped").write_bytes(answer.read())


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
def test_a_slow_worker_of_a_run_is_named_in_its_log_metrics_and_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", max_steps=27)
    make = partial(AllReduceTopology, make_strategy=partial(one_is_slow, tmp_path / "run"))
    with caplog.at_level(logging.WARNING, logger="xdist.metrics"):
        run(config, tmp_path / "run", topologies={"all_reduce": make})
    assert f"worker 1 on {platform.node()} is slow" in caplog.text
    train = records(tmp_path / "run", "train")
    assert {record["straggler"] for record in train[1:]} == {1}
    # In one of them the other worker may have waited for its core.
    assert statistics.mean(each["straggler_cost_s"] for each in train[1:]) > 0.9 * SLOWER_S
    costs = {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families((tmp_path / "run/scraped").read_text())
        for sample in family.samples
        if sample.name == "xdist_straggler_seconds_total"
    }
    assert costs["1"] > 20 * SLOWER_S * 0.9
