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

from datapipe.errors import BadIndex
from datapipe.position import Position
from tests.recorded import Planned, Recording, kill_self, recorded_topology
from tests.small_runs import NUM_TRAIN, causes, final, records, run, saved_step, small_config
from tests.strategies import ActsBefore
from tests.xdist.test_unsaved import lose_all_but_this_node
from xdist import checkpoint
from xdist.config import CheckpointConfig, ClusterConfig, TrainConfig
from xdist.driver import TOPOLOGIES
from xdist.interruption import Interruption
from xdist.topologies import Outcome, RunPlan, Task
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


def tell_after_a_part(driver: int) -> None:
    """SIGTERM to the driver when the next part that this process writes is there."""
    store = checkpoint._store

    def store_and_tell(url: str, payload: bytes | memoryview) -> None:
        checkpoint._store = store
        store(url, payload)
        os.kill(driver, signal.SIGTERM)

    checkpoint._store = store_and_tell


def tell_before_it_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to this process when the second checkpoint is about to be there."""
    calls, publish = itertools.count(1), checkpoint.publish

    def tell_and_publish(url: str, manifest: checkpoint.Manifest) -> checkpoint.Checkpoint:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return publish(url, manifest)

    monkeypatch.setattr(checkpoint, "publish", tell_and_publish)


@pytest.mark.parametrize("being", ["written", "published"])
def test_a_signal_in_the_middle_of_a_save_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, being: str
) -> None:
    saves_often = replace(SAVES_LATE, every_samples=40, keep=100)
    config = config_of(tmp_path, checkpoint=saves_often)
    planned = []
    if being == "written":
        planned.append(Planned("end", 0, 7, partial(tell_after_a_part, os.getpid()), "save"))
    else:
        tell_before_it_publishes(monkeypatch)
    topologies = recorded_topology(tmp_path / "recording", planned)
    saved = interrupted(config, tmp_path, topologies)
    recording = Recording(tmp_path / "recording")
    assert saved == max(recording.steps())
    run(config, tmp_path / "run", topologies=recorded_topology(tmp_path / "again"))
    again = Recording(tmp_path / "again")
    assert min(again.steps()) == saved + 1
    recording.followed_by(again).check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)


def test_what_cannot_be_scored_ends_the_run_when_all_is_saved(tmp_path: Path) -> None:
    scores_often = replace(SAVES_LATE, every_samples=80, evaluate_every=1)
    config = config_of(tmp_path, is_scored=True, checkpoint=scores_often)
    index = tmp_path / "evaluation" / "index.json"
    planned = [Planned("spoil", 0, 3, partial(index.write_text, "{}"))]
    with pytest.raises(BadIndex):
        run(
            config,
            tmp_path / "run",
            topologies=recorded_topology(tmp_path / "recording", planned),
        )
    recording = Recording(tmp_path / "recording")
    recording.check(num_samples=NUM_TRAIN)
    assert saved_step(tmp_path / "run") == max(recording.steps())


def test_what_cannot_be_scored_in_the_end_ends_the_run_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, is_scored=True, max_steps=6)
    raw_alone = replace(config.optimizer, average_half_life_samples=None)
    index = tmp_path / "evaluation" / "index.json"
    planned = [Planned("spoil", 0, 3, partial(index.write_text, "{}"))]
    with pytest.raises(BadIndex):
        run(
            replace(config, optimizer=raw_alone),
            tmp_path / "run",
            topologies=recorded_topology(tmp_path / "recording", planned),
        )
    assert saved_step(tmp_path / "run") == 6


class TellsInASave:
    """A topology that tells its driver to end when one of two servers has written its part of the
    second checkpoint.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._topology = PushPullTopology(plan)
        self._num_saved = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        outcome = self._topology.receive(task, result)
        self._num_saved += task.action == "save"
        if self._num_saved == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome


def test_a_signal_in_the_middle_of_a_save_of_servers_loses_no_update(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    saved = interrupted(config, tmp_path, {"push_pull": TellsInASave})
    run(config, tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run", "start")] == [0, saved]
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=config.num_epochs)


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
