"""What Prometheus sees is what the workers did."""

from __future__ import annotations

import json
import math
import urllib.request
from dataclasses import replace
from pathlib import Path

from datapipe.counters import ReadCounters
from xdist.metrics import TARGETS, Metrics
from xdist.peak_memory import PeakMemory
from xdist.strategies import Progress
from xdist.worker_messages import WorkerReport


def make_report(worker: int, *, step: int, loss: float, num_samples: int) -> WorkerReport:
    return WorkerReport(
        worker=worker,
        host="host",
        progress=Progress(step, step, 8 * step, 0.5),
        num_steps=2,
        num_dropped=1,
        num_samples=num_samples,
        num_images=8,
        loss=loss,
        step_s=0.5,
        data_wait_s=0.1,
        peer_wait_s=0.0,
        standing_s=0.0,
        memory=PeakMemory(400.0, None),
        read=ReadCounters(bytes_read=500, num_reads=2, num_retries=1, num_cache_hits=3),
        staleness={0: 1, 3: 1},
        corrupt=(),
        written=None,
        is_final=False,
        interrupted=None,
    )


def make_metrics() -> Metrics:
    metrics = Metrics(epoch_samples=100, num_workers=2)
    metrics.start_from(step=0, num_samples=0)
    return metrics


def test_a_record_of_a_group_is_that_of_its_fullest_report() -> None:
    late = replace(make_report(1, step=3, loss=2.0, num_samples=20), num_steps=1)
    reports = [make_report(0, step=4, loss=1.25, num_samples=40), late]
    metrics = make_metrics()
    record = metrics.reports(reports)
    assert record["loss"] == 1.25
    assert metrics.registry.get_sample_value("xdist_samples_total") == 40
    assert (record["step"], record["samples"], record["epoch"]) == (4, 32, 0.32)
    assert (record["staleness_mean"], record["staleness_max"]) == (1.5, 3)
    assert record["staleness"] == {"0": 2, "3": 2}


def test_records_do_not_fall_behind_when_reports_overtake_each_other() -> None:
    metrics = make_metrics()
    metrics.reports([make_report(0, step=4, loss=1.0, num_samples=16)])
    late = metrics.reports([make_report(1, step=3, loss=1.0, num_samples=16)])
    assert (late["step"], late["samples"]) == (4, 32)


def test_an_update_of_a_group_counts_once() -> None:
    metrics = make_metrics()
    metrics.reports([make_report(number, step=4, loss=1.0, num_samples=16) for number in (0, 1)])
    value = metrics.registry.get_sample_value
    assert value("xdist_samples_total") == 16
    assert (value("xdist_steps_total"), value("xdist_step_seconds_count")) == (1, 2)


def test_records_tell_how_many_workers_train() -> None:
    metrics = make_metrics()
    metrics.staff(4)
    record = metrics.reports([make_report(3, step=4, loss=1.0, num_samples=16)])
    assert record["num_workers"] == 4
    assert metrics.registry.get_sample_value("xdist_workers") == 4


def test_records_fall_back_with_the_run() -> None:
    metrics = make_metrics()
    metrics.reports([make_report(0, step=4, loss=1.0, num_samples=16)])
    metrics.start_from(step=1, num_samples=8)
    again = metrics.reports([make_report(0, step=2, loss=1.0, num_samples=8)])
    assert (again["step"], again["samples"]) == (2, 16)
    assert again["samples_per_s"] > 0


def test_a_report_without_samples_has_no_loss() -> None:
    record = make_metrics().reports([make_report(0, step=4, loss=math.nan, num_samples=0)])
    assert record["loss"] is None
    json.dumps(record, allow_nan=False)


def test_prometheus_finds_and_reads_it(tmp_path: Path) -> None:
    metrics = make_metrics()
    address = metrics.serve("127.0.0.1", tmp_path)
    metrics.reports([make_report(0, step=4, loss=1.0, num_samples=30)])
    metrics.recovery("worker")
    metrics.checkpoint(0.2)
    metrics.scores("average", {"map100": 0.5})
    assert json.loads((tmp_path / TARGETS).read_text())[0]["targets"] == [address]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        lines = set(answer.read().decode().splitlines())
    metrics.close()
    assert not (tmp_path / TARGETS).exists()
    assert {
        "xdist_samples_total 30.0",
        "xdist_steps_total 1.0",
        "xdist_dropped_pushes_total 1.0",
        "xdist_workers 2.0",
        "xdist_loss 1.0",
        "xdist_read_bytes_total 500.0",
        "xdist_reads_total 2.0",
        "xdist_read_retries_total 1.0",
        "xdist_cache_hits_total 3.0",
        "xdist_cache_misses_total 0.0",
        "xdist_gradient_staleness_count 2.0",
        "xdist_gradient_staleness_sum 3.0",
        "xdist_step_seconds_count 2.0",
        "xdist_data_wait_seconds_total 0.1",
        'xdist_recoveries_total{cause="worker"} 1.0',
        'xdist_score{measure="map100",weights="average"} 0.5',
        "xdist_checkpoint_seconds_count 1.0",
    } <= lines


def test_who_is_gone_has_no_step_time_any_more() -> None:
    metrics = make_metrics()
    metrics.reports([make_report(number, step=4, loss=1.0, num_samples=30) for number in (0, 1)])
    labels = {"worker": "1"}
    assert metrics.registry.get_sample_value("xdist_worker_step_seconds", labels) is not None
    metrics.staff(1)
    assert metrics.registry.get_sample_value("xdist_worker_step_seconds", labels) is None
