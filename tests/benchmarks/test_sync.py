"""make bench-sync without its runs: what it makes of their logs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.sync_figures import (
    OURS,
    OURS_SPARE,
    RAY_TRAIN,
    TORCHRUN,
    Measured,
    Rounds,
    figures,
    missed,
)
from tests.benchmarks.sync_log import Line, StepLog, Timeline
from tests.benchmarks.sync_request import Request

KILLED_AT = 106.1
OLD, KILLED, NEW = 10, 11, 12
MEASURED = Measured(
    first_step_s=20.0,
    step_s=0.5,
    quiet_step_s=0.4,
    mean_step_s=0.6,
    recovery_s=16.0,
    steps_lost=5,
    full_size_s=16.0,
    shrunken_step_s=None,
    grow_pause_s=0.5,
)


def step(number: int, *, at: float, processes: tuple[int, ...]) -> Iterator[Line]:
    for rank, process in enumerate(processes):
        yield Line(at + rank / 100, "ours", rank, process, number, "step")


def before() -> list[Line]:
    """Five steps, a second each from 102 on; the process of rank 1 is killed before the sixth."""
    lines = [line for n in range(1, 6) for line in step(n, at=101.0 + n, processes=(OLD, KILLED))]
    return [*lines, Line(KILLED_AT, "ours", 1, KILLED, 6, "kill")]


def timeline(*after: Iterator[Line]) -> Timeline:
    lines = [*before(), *(line for steps in after for line in steps)]
    return Timeline(lines, launched=95.0, world_size=2)


def shrinks_and_grows() -> Timeline:
    alone = [step(6 + n, at=107.0 + 2 * n, processes=(OLD,)) for n in range(3)]
    return timeline(
        *alone,
        step(9, at=114.0, processes=(OLD, NEW)),
        step(10, at=114.9, processes=(OLD, NEW)),
        step(11, at=120.0, processes=(OLD, NEW)),
    )


def test_a_step_is_finished_when_the_last_process_says_so() -> None:
    run = timeline()
    assert run.first_step_s == pytest.approx(7.01)
    assert run.step_seconds(skipped=1) == pytest.approx([1.0, 1.0, 1.0])


def test_a_run_without_a_kill_has_no_recovery() -> None:
    run = Timeline(before()[:-1], launched=95.0, world_size=2)
    assert len(run.step_seconds(skipped=0)) == 4
    assert run.recovery_s is run.steps_lost is run.full_size_s is run.shrunken_step_s is None


def test_a_run_that_never_stepped_has_no_figure_at_all() -> None:
    run = Timeline([], launched=95.0, world_size=2)
    assert all(value is None for value in vars(Measured.of(run)).values())


def test_the_survivors_steps_are_told_from_those_of_full_size() -> None:
    run = shrinks_and_grows()
    assert run.recovery_s == pytest.approx(0.9)
    assert run.steps_lost == 0
    assert run.shrunken_step_s == pytest.approx(2.0)
    assert run.full_size_s == pytest.approx(114.01 - KILLED_AT)


def test_the_pause_of_growing_ends_with_the_second_step_of_full_size() -> None:
    assert shrinks_and_grows().grow_pause_s == pytest.approx(114.01 - 111.0)


def test_a_restart_from_a_checkpoint_does_steps_again() -> None:
    again = [step(n, at=120.0 + n, processes=(20, 21)) for n in range(3, 8)]
    run = timeline(*again)
    assert run.steps_lost == 3
    assert run.recovery_s == run.full_size_s == pytest.approx(123.01 - KILLED_AT)
    assert run.shrunken_step_s is None
    assert len(run.step_seconds(skipped=0)) == 4


def test_a_step_that_is_told_of_after_the_kill_is_no_recovery() -> None:
    run = timeline(step(5, at=106.2, processes=(OLD,)), step(6, at=108.0, processes=(OLD,)))
    assert run.recovery_s == pytest.approx(108.0 - KILLED_AT)
    assert run.steps_lost == 0


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    for rank in (0, 1):
        log = StepLog(str(path), "ours", rank, kill_rank=0, kill_step=3)
        log.finished(1)
        log.kill_before(2)
    lines = [Line.parse(text) for text in path.read_text().splitlines()]
    assert [(line.rank, line.step, line.event) for line in lines] == [
        (0, 1, "step"),
        (1, 1, "step"),
    ]
    assert Timeline.read(path, launched=lines[0].time - 2, world_size=2).first_step_s is not None


def test_a_request_survives_the_command_line() -> None:
    request = Request("log", "run", "data", 41, 10, 1, 36, {"num_spares": 1})
    assert Request.from_json(request.to_json()) == request


def rounds_of(*rounds: dict[str, Measured]) -> Rounds:
    found = Rounds()
    for each in rounds:
        found.begin()
        for run, measured in each.items():
            found.add(run, measured)
    return found


def ours(**changes: float) -> Measured:
    values = {"first_step_s": 8.0, "recovery_s": 0.8, "steps_lost": 0.0, "full_size_s": 6.0}
    return replace(MEASURED, shrunken_step_s=0.7, **{**values, **changes})


def test_ratios_are_medians_of_the_rounds_ratios() -> None:
    slow = replace(MEASURED, step_s=2.0)
    values = figures(
        rounds_of(
            {TORCHRUN: MEASURED, OURS: ours()},
            {TORCHRUN: slow, OURS: ours(step_s=2.0)},
            {TORCHRUN: slow, OURS: ours(step_s=0.5)},
        )
    )
    assert values["steps_ratio_vs_torchrun"] == 1.0
    assert values["recovery_ratio_vs_torchrun"] == 20.0
    assert values["steps_per_s_torchrun"] == 0.5
    assert values["steps_ratio_vs_ray_train"] is None


def test_a_spare_is_compared_by_the_way_back_to_full_size() -> None:
    values = figures(
        rounds_of({RAY_TRAIN: MEASURED, OURS: ours(), OURS_SPARE: ours(full_size_s=2.0)})
    )
    assert values["spare_recovery_ratio_vs_ray_train"] == 8.0
    assert values["full_size_s_ours"] == 6.0


def test_every_limit_is_checked() -> None:
    runs = {TORCHRUN: MEASURED, RAY_TRAIN: MEASURED, OURS: ours(), OURS_SPARE: ours(full_size_s=2)}
    assert missed(figures(rounds_of(runs))) == []
    worse = ours(step_s=0.6, first_step_s=11, recovery_s=3, steps_lost=1, grow_pause_s=4)
    lines = missed(figures(rounds_of({**runs, OURS: worse, OURS_SPARE: ours()})))
    assert len(lines) == 9


def test_a_figure_that_is_not_there_is_missed() -> None:
    lines = missed(figures(rounds_of({TORCHRUN: MEASURED, RAY_TRAIN: MEASURED})))
    assert len(lines) == 9
    assert all(line.endswith("is not there") for line in lines)
