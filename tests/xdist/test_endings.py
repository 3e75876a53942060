"""Runs that end before their time: what was trained is saved first, and the run goes on from it."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datapipe.position import Position
from tests.recorded import Planned, Recording, kill_self, recorded_topology
from tests.small_runs import NUM_TRAIN, causes, final, records, run, saved_step, small_config
from tests.strategies import ActsBefore
from tests.xdist.test_unsaved import lose_all_but_this_node
from xdist import checkpoint
from xdist.config import CheckpointConfig, ClusterConfig, TrainConfig
from xdist.driver import TOPOLOGIES
from xdist.interruption import Interruption
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("cluster"),
]
SAVES_LATE = CheckpointConfig(every_samples=100_000, evaluate_every=0, final_save_s=60)


def config_of(directory: Path, **changes: Any) -> TrainConfig:
    config = small_config(directory, strategy="all_reduce", **{"num_workers": 3, **changes})
    sized = replace(config, batch_size=12, num_lanes=12, num_epochs=6)
    return sized if "checkpoint" in changes else replace(sized, checkpoint=SAVES_LATE)


def told(driver: int, then: Callable[[], object] = int) -> Callable[[], None]:
    """SIGTERM to the driver, then that, in a worker's process."""
    return partial(_tell, driver, then)


def _tell(driver: int, then: Callable[[], object]) -> None:
    os.kill(driver, signal.SIGTERM)
    then()


def interrupted(config: TrainConfig, directory: Path, topologies: Any) -> int:
    """Run until a signal ends it; the step that is saved."""
    interruption = Interruption()
    with interruption.heard(), pytest.raises(KeyboardInterrupt):
        run(config, directory / "run", topologies=topologies, interruption=interruption)
    assert interruption.is_termination
    return saved_step(directory / "run")


def test_survivors_that_are_too_few_to_train_save_what_they_have(tmp_path: Path) -> None:
    config = config_of(tmp_path, cluster=ClusterConfig(min_world_size=3))
    act = told(os.getpid(), kill_self)
    topologies = recorded_topology(tmp_path / "recording", [Planned("end", 1, 7, act)])
    saved = interrupted(config, tmp_path, topologies)
    recording = Recording(tmp_path / "recording")
    assert saved == max(recording.steps()) >= 6
    run(config, tmp_path / "run", topologies=recorded_topology(tmp_path / "again", []))
    again = Recording(tmp_path / "again")
    assert min(again.steps()) == saved + 1
    recording.followed_by(again).check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)


def test_a_run_beyond_its_budget_saves_first(tmp_path: Path) -> None:
    """Though a signal has told it to end already."""
    config = config_of(tmp_path, cluster=ClusterConfig(max_recoveries=0))
    act = told(os.getpid(), kill_self)
    topologies = recorded_topology(tmp_path / "recording", [Planned("end", 1, 7, act)])
    saved = interrupted(config, tmp_path, topologies)
    assert saved == max(Recording(tmp_path / "recording").steps())
    assert causes(tmp_path / "run") == ["worker 1 lost"]


def hang(directory: Path, number: int, driver: int) -> None:
    """The last worker that hangs tells the driver to end."""
    (directory / f"hangs-{number}").touch()
    if len(list(directory.glob("hangs-*"))) == 2:
        os.kill(driver, signal.SIGTERM)
    threading.Event().wait(100)


def hanging_strategy(directory: Path, driver: int, config: Any, flat: Any, *, number: int) -> Any:
    strategy = push_pull_strategy(config, flat, number=number)
    act = partial(hang, directory, number, driver)
    return ActsBefore(strategy, 4 + 2 * number, directory / f"acts-{number}", act)


def test_servers_save_what_they_have_though_no_worker_pushes(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", checkpoint=SAVES_LATE)
    make_strategy = partial(hanging_strategy, tmp_path, os.getpid())
    topology = partial(PushPullTopology, make_strategy=make_strategy)
    assert interrupted(config, tmp_path, {"push_pull": topology}) == 3 + 5
    run(config, tmp_path / "run")
    last = final(tmp_path / "run").manifest.cut
    assert last.position == Position(epoch=config.num_epochs)
    assert [record["step"] for record in records(tmp_path / "run", "start")] == [0, 8]


def test_a_state_that_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    """The signal comes while the first group comes together."""
    planned = [Planned("end", 0, 1, told(os.getpid()), "joining")]
    topologies = recorded_topology(tmp_path / "recording", planned)
    first = tmp_path / "run" / "checkpoints" / "step-000000000000"
    assert interrupted(config_of(tmp_path), tmp_path, topologies) == 0
    assert len(list(first.iterdir())) == 3
    assert Recording(tmp_path / "recording").applied == []


@pytest.mark.long
def test_a_run_that_looks_for_its_checkpoint_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only worker is lost, and the storage is away."""
    calls, find_again = itertools.count(), checkpoint.find_again

    def find_and_tell(run_dir: str) -> checkpoint.Checkpoint:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return find_again(run_dir)

    monkeypatch.setattr(checkpoint, "find_again", find_and_tell)
    directory = tmp_path / "run" / "checkpoints"
    planned = [Planned("end", 0, 5, partial(lose_all_but_this_node, directory))]
    topologies = recorded_topology(tmp_path / "recording", planned)
    interruption, config = Interruption(), config_of(tmp_path, num_workers=1)
    with interruption.heard(), pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", topologies=topologies, interruption=interruption)
    assert next(calls) == 2
    assert "storage failed" in causes(tmp_path / "run")


def test_a_storage_that_hangs_holds_up_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, is_over = checkpoint.publish, threading.Event()

    def publish_never(url: str, manifest: checkpoint.Manifest) -> checkpoint.Checkpoint:
        if manifest.cut.step:
            os.kill(os.getpid(), signal.SIGTERM)
            is_over.wait(100)
        return publish(url, manifest)

    monkeypatch.setattr(checkpoint, "publish", publish_never)
    hangs = replace(SAVES_LATE, every_samples=84, final_save_s=1)
    config = replace(config_of(tmp_path, checkpoint=hangs), num_epochs=100_000)
    try:
        assert interrupted(config, tmp_path, TOPOLOGIES) == 0
    finally:
        is_over.set()
