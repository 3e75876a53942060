"""Checkpoints that cannot be written, by one node or at all: nothing is lost for it."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from datapipe.position import Position
from tests.clusters import wait_until
from tests.recorded import (
    Announcing,
    Planned,
    Recording,
    kill_self,
    recorded_strategy,
    recorded_topology,
)
from tests.small_runs import (
    NUM_TRAIN,
    causes,
    final,
    records,
    run,
    saved_step,
    small_config,
    weights_of,
)
from tests.strategies import Wrapped
from xdist import checkpoint, scorer
from xdist.config import ClusterConfig
from xdist.errors import RunDirectoryError
from xdist.flat import FlatModel
from xdist.scorer import Scorer
from xdist.share_writer import Written
from xdist.strategies import Share
from xdist.topologies import Outcome, RunPlan, Task
from xdist.topologies.actors import CONTROL
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.push_pull import PushPullTopology
from xdist.worker_messages import WorkerReport

pytestmark = [
    pytest.mark.faults,
    pytest.mark.long,  # A storage is given time.
    pytest.mark.ray,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("cluster"),
]

SMALL_FILES_FIT = 1 << 16
"""Bytes: less than any part has."""


def fill_disk() -> None:
    """A largest file size is refused to a process as a full disk is: in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES_FIT, SMALL_FILES_FIT))


def test_a_worker_whose_disk_is_full_leaves_saving_to_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=3)
    config = replace(config, batch_size=12, num_lanes=12, num_epochs=6)
    planned = Planned("fill", 1, 7, fill_disk, "save")
    topologies = recorded_topology(tmp_path / "recording", [planned])
    run(config, tmp_path / "run", topologies=topologies)
    recording = Recording(tmp_path / "recording")
    recording.check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    assert recording.sizes() == [3]
    assert causes(tmp_path / "run") == []
    assert caplog.text.count("worker 1 leaves saving to the others") == 1
    saved = [record["step"] for record in records(tmp_path / "run", "checkpoint")]
    assert saved == sorted(set(saved))
    due = due_steps(recording, every=40)
    assert saved[-1] == max(due)
    given_up = set(map(int, re.findall(r"checkpoint given up step=(\d+)", caplog.text)))
    left_out = set(map(int, re.findall(r"checkpoint left out, .* step=(\d+)", caplog.text)))
    assert given_up
    assert not given_up & set(saved)
    assert due - set(saved) <= given_up | left_out


def due_steps(recording: Recording, *, every: int) -> set[int]:
    """The steps of whose state an undisturbed run has checkpoints."""
    due, num_done = {max(recording.steps())}, 0
    for step in sorted(recording.steps()):
        before = num_done
        num_done += sum(len(line["ids"]) for line in recording.tried if line["step"] == step)
        due |= {step} if checkpoint.is_due(before, num_done, every=every) else set()
    return due


def take_away(checkpoints: Path) -> None:
    """Until `bring_back`, nobody can write there."""
    if checkpoints.is_dir():
        checkpoints.rename(checkpoints.with_name("away"))
        checkpoints.touch()


def bring_back(checkpoints: Path) -> None:
    if checkpoints.is_file():
        checkpoints.unlink()
        checkpoints.with_name("away").rename(checkpoints)


class StorageIsGone(Wrapped):
    """A strategy for whose second save there is no storage any more."""

    def __init__(self, strategy: Any, checkpoints: Path) -> None:
        super().__init__(strategy)
        self._checkpoints = checkpoints
        self._num_saves = 0

    def save(self, share: Share) -> None:
        self._num_saves += 1
        if self._num_saves == 2:
            take_away(self._checkpoints)
        self.strategy.save(share)


def without_storage(
    checkpoints: Path, plan: RunPlan, flat: FlatModel, **named: Any
) -> StorageIsGone:
    return StorageIsGone(all_reduce_strategy(plan, flat, **named), checkpoints)


class StorageIsBack:
    """A topology whose storage is back when so many saves have failed."""

    def __init__(self, plan: RunPlan, *, num_failures: float) -> None:
        self._checkpoints = Path(plan.run_dir) / "checkpoints"
        make_strategy = partial(without_storage, self._checkpoints)
        self._topology = AllReduceTopology(plan, make_strategy=make_strategy)
        self._num_left = num_failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        written = result.written if isinstance(result, WorkerReport) else result
        if isinstance(written, Written) and written.unsaved is not None:
            self._num_left -= 1
        if self._num_left == 0:
            bring_back(self._checkpoints)
        return self._topology.receive(task, result)


def test_a_storage_that_is_gone_for_a_while_costs_no_step(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1)
    run(config, tmp_path / "undisturbed")
    topology = partial(StorageIsBack, num_failures=1)
    run(config, tmp_path / "run", topologies={"all_reduce": topology})
    assert set(causes(tmp_path / "run")) == {"storage did not save"}
    disturbed, undisturbed = final(tmp_path / "run"), final(tmp_path / "undisturbed")
    assert torch.equal(weights_of(disturbed), weights_of(undisturbed))


def test_a_storage_that_stays_away_ends_the_run_with_what_it_says(tmp_path: Path) -> None:
    """After a while, in which it trains; and no fault of workers."""
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1)
    config = replace(
        config,
        cluster=ClusterConfig(max_recoveries=0),
        checkpoint=replace(config.checkpoint, max_age_s=12, final_save_s=1),
    )
    topologies = {"all_reduce": partial(StorageIsBack, num_failures=math.inf)}
    said = r"(?s)no checkpoint could be saved for 1. s, .* 12: .*/step-.* cannot be written"
    with pytest.raises(RunDirectoryError, match=said):
        run(config, tmp_path / "run", topologies=topologies)
    trained = records(tmp_path / "run", "train")[-1]["step"]
    bring_back(tmp_path / "run" / "checkpoints")
    assert trained > saved_step(tmp_path / "run")


class AwayForAWhile(Announcing):
    """A topology whose run directory is away for some seconds, when the parts of its second
    checkpoint are written, and not published yet.
    """

    def __init__(self, plan: RunPlan, *, seconds: float, **how: Any) -> None:
        super().__init__(plan, **how)
        self._path = Path(plan.run_dir)
        self._seconds = seconds
        self._num_saved = 0

    def receive(self, task: Task, result: Any) -> Outcome:
        outcome = super().receive(task, result)
        self._num_saved += bool(outcome.saved)
        if outcome.saved and self._num_saved == 2:
            take_away(self._path)
            threading.Timer(self._seconds, bring_back, [self._path]).start()
        return outcome


def note_time_and_die(file: Path) -> None:
    file.write_text(str(time.time()))
    kill_self()


def test_a_run_directory_that_is_away_when_a_checkpoint_is_published_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    """Neither the others nor the driver, who hears at once that a worker is lost; what it cannot
    write into the run directory it writes later.
    """
    config = small_config(tmp_path, strategy="all_reduce")
    config = replace(config, batch_size=12, num_lanes=12, num_epochs=6)
    directory, killed_at = tmp_path / "recording", tmp_path / "killed-at"
    directory.mkdir()
    kill = Planned("kill", 1, 9, partial(note_time_and_die, killed_at))
    make_strategy = partial(recorded_strategy, directory, [kill], 2, 0, 0, "", {})
    make = partial(AwayForAWhile, seconds=6.0, directory=directory, make_strategy=make_strategy)
    run(config, tmp_path / "run", topologies={"all_reduce": make})
    Recording(directory).check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    [lost] = [r for r in records(tmp_path / "run", "recovery") if r["cause"] == "worker 1 lost"]
    assert lost["time"] - float(killed_at.read_text()) < 4


class ServersWithoutStorage:
    """A topology whose servers have no storage at its second cut, until one has said so."""

    def __init__(self, plan: RunPlan) -> None:
        self._topology = PushPullTopology(plan)
        self._num_cuts = 0
        self._checkpoints = Path(plan.run_dir) / "checkpoints"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        if task.action == "cut" and result is not None:
            self._num_cuts += 1
            if self._num_cuts == 2:
                take_away(self._checkpoints)
        if task.action == "save" and result.unsaved is not None:
            bring_back(self._checkpoints)
        return self._topology.receive(task, result)


def test_servers_save_again_what_they_could_not(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    run(config, tmp_path / "run", topologies={"push_pull": ServersWithoutStorage})
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=2)
    found = causes(tmp_path / "run")
    assert found
    assert set(found) <= {"server 0 did not save", "server 1 did not save"}
    saved = [record["samples"] for record in records(tmp_path / "run", "checkpoint")]
    assert len(saved) == len(set(saved))  # One may be given up that two later ones have overtaken.
    assert max(saved) == 2 * NUM_TRAIN


def lose_all_but_this_node(checkpoints: Path) -> None:
    take_away(checkpoints)
    kill_self()


def test_when_all_are_lost_while_the_storage_is_away_it_is_waited_for(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1)
    checkpoints = tmp_path / "run" / "checkpoints"
    planned = Planned("lose", 0, 5, partial(lose_all_but_this_node, checkpoints))
    topologies = recorded_topology(tmp_path / "recording", [planned])
    with ThreadPoolExecutor(1) as beside:
        back = beside.submit(bring_back_after, checkpoints, seconds=2.0)
        run(config, tmp_path / "run", topologies=topologies)
        back.result()
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=2)


def bring_back_after(checkpoints: Path, *, seconds: float) -> None:
    """It stays away for that time."""
    wait_until(lambda: checkpoints.is_file() or None)
    threading.Event().wait(seconds)
    bring_back(checkpoints)


def test_a_checkpoint_that_is_away_when_it_is_scored_is_scored_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1, is_scored=True)
    monkeypatch.setattr(scorer, "PUT_OFF_S", 2.0)
    monkeypatch.setattr(Scorer, "go_on", away_at_first)
    run(config, tmp_path / "run")
    assert [score["weights"] for score in records(tmp_path / "run", "evaluation")][-2:] == [
        "average",
        "raw",
    ]
    assert causes(tmp_path / "run") == ["scoring failed"] * 2


def away_at_first(self: Scorer, go_on: Callable[[Scorer], None] = Scorer.go_on) -> None:
    """Begin to score; the first time the checkpoint is not there."""
    go_on(self)
    if self.task is not None and not self._num_put_off:
        [url] = self.checkpoint_urls
        manifest = Path(url) / "manifest.json"
        if manifest.exists():
            manifest.rename(manifest.with_name("away"))
            ray.wait([self.task])
            manifest.with_name("away").rename(manifest)


def test_a_process_that_hangs_while_it_scores_is_ended_and_the_checkpoint_scored_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1, is_scored=True)
    monkeypatch.setattr(scorer, "SILENCE_LIMIT_S", 6.0)
    monkeypatch.setattr(Scorer, "go_on", partialmethod(stopped_at_first, tmp_path / "stopped"))
    run(config, tmp_path / "run")
    assert [score["weights"] for score in records(tmp_path / "run", "evaluation")][-2:] == [
        "average",
        "raw",
    ]
    assert "what scores gave no answer for 6 s" in caplog.text
    assert "scoring lost recoveries=1" in caplog.text


def stopped_at_first(
    self: Scorer, marker: Path, go_on: Callable[[Scorer], None] = Scorer.go_on
) -> None:
    """Begin to score; the first process that does is stopped."""
    go_on(self)
    if self._process is not None and not marker.exists():
        call: Any = self._process.__ray_call__.options(concurrency_group=CONTROL)
        process_id = ray.get(call.remote(lambda _process: os.getpid()))
        os.kill(process_id, signal.SIGSTOP)
        marker.touch()


def lose_file_system(run_dir: Path, own_disk: Path) -> None:
    """What this process writes into the run directory lands on its own disk from now on."""
    store = checkpoint._store
    checkpoint._store = lambda url, payload: store(
        url.replace(str(run_dir), str(own_disk)), payload
    )


@pytest.mark.by_hand
def test_a_worker_whose_node_has_lost_the_file_system_leaves_saving_to_the_others(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=3)
    config = replace(config, batch_size=12, num_lanes=12, num_epochs=6)
    lose = partial(lose_file_system, tmp_path / "run", tmp_path / "own")
    planned = Planned("lose", 1, 7, lose, "save")
    run(
        config,
        tmp_path / "run",
        topologies=recorded_topology(tmp_path / "recording", [planned]),
    )
    Recording(tmp_path / "recording").check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)
    assert causes(tmp_path / "run") == []
    assert not (tmp_path / "own").exists()
    assert records(tmp_path / "run", "checkpoint")[-1]["samples"] == 6 * NUM_TRAIN
