"""make bench-async without its long runs: what it makes of what they say, and two short ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datapipe.position import Span
from tests.benchmarks import async_pushes, async_ray_example, async_recovery
from tests.benchmarks.async_figures import (
    KERNEL,
    LARGEST,
    OURS,
    OURS_BF16,
    OURS_OBJECT_STORE,
    OVERLAP_0,
    OVERLAP_1,
    RAY_EXAMPLE,
    SMALLEST,
    TORCH,
    TORCH_OPTIM,
    WITHOUT_LIMIT,
    Results,
    figures,
    missed,
)
from tests.benchmarks.async_fire import End, lost_and_double, recoveries
from tests.benchmarks.async_log import (
    GRADIENT,
    Line,
    Logged,
    PushLog,
    SameGradient,
    Waits,
    updates_per_second,
)
from tests.benchmarks.async_pushes import batch_of
from xdist.computation import BatchSums
from xdist.flat import FlatModel
from xdist.strategies import Progress

NUM_SAMPLES = 6
OLD, KILLED, NEW = 10, 11, 12


class Plain:
    """A strategy as far as it is looked at: what it is told."""

    def __init__(self) -> None:
        self.progress = Progress(own_step=0, step=0, num_samples=0, learning_rate=0.0)
        self.told: list[object] = []

    def begin(self, _batch: object, _sums: object) -> None:
        self.told.append("begin")

    def gradient_ready(self, parameter: int) -> None:
        self.told.append(parameter)

    def update(self, *_of_batch: object) -> None:
        self.told.append("update")
        self.progress = replace(self.progress, step=self.progress.step + 7)


def push(
    version: int, *, at: float, worker: int = 0, process: int = OLD, number: int | None = None
) -> Iterator[Line]:
    """An update of two places that takes half a second; the places follow from its number."""
    number = version if number is None else number
    first = 2 * (number - 1)
    span = Span(first // NUM_SAMPLES, first % NUM_SAMPLES, first % NUM_SAMPLES + 2)
    line = Line("sent", at, f"worker {worker}", process, number, spans=(span,))
    yield line
    yield replace(line, event="committed", time=at + 0.5, version=version)


def strike(who: str, *, at: float) -> Iterator[Line]:
    yield Line("strike", at, who, 1)


def lines_of(*parts: Iterator[Line]) -> list[Line]:
    return sorted((line for part in parts for line in part), key=lambda line: line.time)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = PushLog(str(tmp_path / "log"))
    span = Span(0, 0, 2)
    log.add("sent", "worker 1", number=1, spans=(span,))
    log.add("committed", "worker 1", number=1, version=3, spans=(span,))
    sent, committed = log.read()
    assert (sent.event, sent.who, sent.spans) == ("sent", "worker 1", (span,))
    assert (committed.version, committed.process) == (3, sent.process)


def test_strategies_log_wait_and_replace_gradients_for_another_one(tmp_path: Path) -> None:
    flat = FlatModel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    plain, log = Plain(), PushLog(str(tmp_path / "log"))
    over = tmp_path / "over"
    over.touch()
    waits = Waits(SameGradient(plain, flat), 3600.0, over=over)
    strategy = Logged(waits, log, number=1)
    batch, sums = batch_of((Span(0, 0, 2),)), BatchSums(flat)
    strategy.begin(batch, sums)
    for parameter in reversed(range(4)):
        strategy.gradient_ready(parameter)
    strategy.update(batch, sums)
    assert plain.told == ["begin", 3, 2, 1, 0, "update"]
    assert torch.all(flat.gradients == GRADIENT)
    assert [(line.event, line.version) for line in log.read()] == [("sent", 0), ("committed", 7)]


def test_workers_count_each_over_their_own_time() -> None:
    fast = [push(n, at=100.0 + n, number=n) for n in range(1, 10)]
    slow = [push(n, at=100.0 + 4 * n, worker=1, number=n) for n in range(1, 6)]
    assert updates_per_second(lines_of(*fast, *slow)) == pytest.approx(1.25)


def test_a_worker_without_enough_updates_has_no_rate() -> None:
    with pytest.raises(ValueError, match="worker 0 made 3 updates"):
        updates_per_second(lines_of(*(push(n, at=100.0 + n) for n in range(1, 4))))


def test_a_lost_worker_is_back_when_its_replacement_has_pushed() -> None:
    lines = lines_of(
        push(1, at=100.0, worker=1, process=KILLED),
        strike("worker 1", at=101.0),
        push(2, at=102.0),
        push(3, at=106.0, worker=1, process=NEW, number=1),
    )
    [recovery] = recoveries(lines)
    assert recovery.who == "worker 1"
    assert recovery.seconds == pytest.approx(5.5)


def test_a_push_from_before_the_strike_is_no_recovery_of_a_server() -> None:
    lines = lines_of(push(1, at=100.8), strike("server 0", at=101.0), push(2, at=103.0))
    [recovery] = recoveries(lines)
    assert recovery.seconds == pytest.approx(2.5)


def test_a_run_that_does_not_go_on_has_no_recovery() -> None:
    [recovery] = recoveries(lines_of(push(1, at=100.0), strike("server 1", at=101.0)))
    assert recovery.seconds is None


def whole_run() -> list[Line]:
    return lines_of(*(push(n, at=100.0 + n) for n in range(1, 7)))


END = End(version=6, num_places=12, fewest_applied=6, most_applied=6)


def found(lines: list[Line], end: End = END) -> tuple[int, int]:
    return lost_and_double(lines, end, num_samples=NUM_SAMPLES)


def test_a_whole_run_has_lost_nothing() -> None:
    assert found(whole_run()) == (0, 0)


def test_a_push_whose_worker_did_not_live_to_see_it_is_not_lost() -> None:
    lines = [line for line in whole_run() if (line.event, line.number) != ("committed", 4)]
    assert found(lines) == (0, 0)


def test_an_update_that_was_seen_and_is_made_again_was_lost() -> None:
    again = lines_of(push(6, at=110.0, worker=1, number=6))
    assert found(whole_run() + again) == (1, 0)


def test_an_update_after_the_end_was_lost() -> None:
    end = End(version=5, num_places=10, fewest_applied=5, most_applied=5)
    assert found(whole_run(), end) == (1, 0)


def test_what_the_weights_lack_or_have_once_more_is_told() -> None:
    assert found(whole_run(), replace(END, fewest_applied=4)) == (2, 0)
    assert found(whole_run(), replace(END, most_applied=7)) == (0, 1)


def test_places_that_nobody_pushed_were_lost() -> None:
    numbers = enumerate((1, 2, 3, 5, 6), start=1)
    lines = lines_of(*(push(version, at=100.0 + n, number=n) for version, n in numbers))
    assert found(lines, End(5, 12, 5, 5)) == (2, 0)


def test_places_that_are_pushed_twice_are_double() -> None:
    again = lines_of(push(7, at=110.0, worker=1, number=6))
    assert found(whole_run() + again, End(7, 12, 7, 7)) == (0, 1)


def test_a_version_that_no_push_explains_is_double() -> None:
    assert found(whole_run(), End(7, 12, 7, 7)) == (0, 1)


RATES = {
    RAY_EXAMPLE: 2.5,
    OURS: 50.0,
    OURS_BF16: 60.0,
    OURS_OBJECT_STORE: 20.0,
    KERNEL: 60.0,
    TORCH: 5.0,
    TORCH_OPTIM: 4.0,
    OVERLAP_0: 10.0,
    OVERLAP_1: 18.0,
}


def under_fire(**seconds: float | None) -> dict[str, Any]:
    struck = [{"who": name.replace("_", " "), "seconds": value} for name, value in seconds.items()]
    return {"recoveries": struck, "lost_updates": 0, "double_updates": 0, "num_updates": 900}


def results(*rounds: Mapping[str, float]) -> Results:
    return Results(
        [dict(each) for each in rounds],
        {"alone": 6.5, "asynchronous": 6.4, "synchronous": 2.0},
        under_fire(worker_1=6.0, server_0=0.5, server_1=0.7),
        under_fire(node=4.0),
    )


def test_ratios_are_medians_of_the_rounds_ratios() -> None:
    slow = {name: rate / 2 for name, rate in RATES.items()}
    values = figures(results(RATES, slow, {**RATES, OURS: 10.0}))
    assert values["updates_ratio_vs_ray_example"] == 20.0
    assert values["updates_per_s_ray_example"] == 2.5
    assert values["fraction_of_kernel_rate"] == 0.833
    assert values["overlap_gain"] == 1.8


def test_the_slower_of_the_servers_counts() -> None:
    values = figures(results(RATES))
    assert values["server_recovery_s"] == 0.7
    assert values["server_node_recovery_s"] == 4.0
    assert values["straggler_efficiency"] == 0.985


def test_every_limit_is_checked() -> None:
    assert missed(figures(results(RATES))) == []
    worse = results({**RATES, OURS: 10.0, OURS_OBJECT_STORE: 10.0, TORCH: 10.0})
    worse.stragglers = {"alone": 6.5, "asynchronous": 6.0, "synchronous": 2.0}
    worse.processes_lost = {
        **under_fire(worker_1=6.0, server_0=2.5, server_1=0.7),
        "lost_updates": 1,
        "double_updates": 1,
    }
    lines = missed(figures(worse))
    assert len(lines) == len(SMALLEST) + len(LARGEST)


def test_a_figure_that_is_not_there_is_missed() -> None:
    lines = missed(figures(Results()))
    assert len(lines) == len(SMALLEST) + len(LARGEST) + len(WITHOUT_LIMIT)
    assert all(line.endswith("is not there") for line in lines)


def test_a_server_that_never_recovered_has_no_figure() -> None:
    found = results(RATES)
    found.processes_lost = under_fire(worker_1=6.0, server_0=None, server_1=0.7)
    assert figures(found)["server_recovery_s"] is None


def test_a_request_survives_the_command_line() -> None:
    request = async_pushes.Request(seconds=6.0, num_servers=2, servers={"overlap": 1})
    assert async_pushes.Request(**json.loads(json.dumps(asdict(request)))) == request
    struck = async_recovery.Request(("server 0",), node={"node_id": "a"})
    assert tuple(async_recovery.Request(**json.loads(json.dumps(asdict(struck)))).strikes) == (
        "server 0",
    )


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.usefixtures("cluster")
def test_both_make_updates_of_a_small_network() -> None:
    ours = async_pushes.Request(seconds=0.3, num_servers=2, width=0.125, warm_up_s=0.1)
    peers = async_ray_example.Request(seconds=0.3, width=0.125)
    assert async_pushes.updates_per_second(ours) > 0
    assert async_ray_example.updates_per_second(peers) > 0
