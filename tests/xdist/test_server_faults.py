"""Servers and replicas that are killed, stop, or lose a connection, at planned steps."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from datapipe.position import Position
from tests import connections
from tests.clusters import AddedNode, wait_until
from tests.server_versions import EndsAtOneVersion
from tests.small_runs import causes, final, records, run, small_config
from tests.strategies import ActsBefore
from xdist.config import ClusterConfig
from xdist.servers_config import ServersConfig
from xdist.topologies import Outcome, RunPlan, Task, server_crew
from xdist.topologies.crew import PULSE_S
from xdist.topologies.push_pull import push_pull_strategy
from xdist.topologies.server_crew import ServerHand
from xdist.worker_messages import WorkerReport

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("cluster"),
]

DONE = Position(epoch=2)


class StrikesServers(EndsAtOneVersion):
    """A topology in which servers get a signal, once in a run, when it has come to a step."""

    def __init__(
        self,
        plan: RunPlan,
        *,
        names: Collection[str],
        number: int = signal.SIGKILL,
        step: int = 12,
        **how: Any,
    ) -> None:
        """names: as "server 0" and "replica 0". how: arguments of `PushPullTopology`."""
        super().__init__(plan, **how)
        self._names = names
        self._number = number
        self._step = step
        self.has_struck = False

    def receive(self, task: Task, result: Any) -> Outcome:
        is_due = isinstance(result, WorkerReport) and result.progress.step >= self._step
        is_now = is_due and not self.has_struck
        if is_now:
            self.has_struck = True
            self._strike()
        outcome = self._topology.receive(task, result)
        if is_now:
            self._follow_up()
        return outcome

    def _name_of(self, hand: ServerHand) -> str:
        is_primary = hand in self._topology._servers.primaries
        return f"{'server' if is_primary else 'replica'} {hand.number}"

    def _strike(self) -> None:
        servers = self._topology._servers
        for hand in list(servers):
            if self._name_of(hand) in self._names:
                assert hand.process is not None
                os.kill(hand.process.process_id, self._number)

    def _follow_up(self) -> None:
        """What happens at once after it."""


class NotesVersions(StrikesServers):
    """Writes down at which versions the servers are that are left when one is lost."""

    def replace(self, lost: Task) -> Outcome | None:
        if lost.role == "server":
            left = [hand for hand in self._topology._servers if hand.life != lost.life]
            actors = [hand.actor for hand in left if self._name_of(hand) not in self._names]
            versions: list[int] = ray.get([actor.pulse.remote(0) for actor in actors])
            file_of_versions(self._plan.run_dir).write_text(json.dumps(versions))
        return self._topology.replace(lost)


def file_of_versions(run_dir: str) -> Path:
    return Path(run_dir).with_name("versions.json")


def run_with_struck_servers(
    directory: Path,
    *names: str,
    replicas: Literal[0, 1],
    topology: type[StrikesServers] = StrikesServers,
    **how: Any,
) -> None:
    """A run to its end, whose places are all done once."""
    config = small_config(directory, strategy="push_pull")
    config = replace(config, servers=ServersConfig(replicas=replicas))
    make = partial(topology, names=names, **how)
    run(config, directory / "run", topologies={"push_pull": make})
    assert final(directory / "run").manifest.cut.position == DONE


def was_set_back(directory: Path) -> bool:
    """Whether any update was made twice: whether a record tells of an earlier step."""
    steps = [record["step"] for record in records(directory / "run", "train")]
    return steps != sorted(steps)


class StrikesAtLastCut(StrikesServers):
    """A topology in which servers get a signal when all have been asked for the last cut."""

    def receive(self, task: Task, result: Any) -> Outcome:
        outcome = self._topology.receive(task, result)
        if task.action == "cut" and result is not None and result.is_final and not self.has_struck:
            self.has_struck = True
            self._strike()
        return outcome


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.by_hand), 1])
def test_a_server_that_is_killed_while_the_last_cut_is_saved_costs_nothing(
    tmp_path: Path, number: int
) -> None:
    """The other one is still at it when it is asked again. A network whose parts take a while."""
    config = small_config(tmp_path, strategy="push_pull", num_epochs=1, max_steps=4)
    model = replace(config.model, width=1.0, fc=(2048, 2048))
    config = replace(config, servers=ServersConfig(replicas=1), model=model)
    make = partial(StrikesAtLastCut, names=[f"server {number}"])
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert causes(tmp_path / "run") == [f"server {number} lost"]
    assert final(tmp_path / "run").manifest.cut.num_samples == 16
    assert not was_set_back(tmp_path)


class LosesServerBeforeItSaves(EndsAtOneVersion):
    """A topology that hears of the first cut when updates have followed it, and it has dealt with
    the loss of server 1.
    """

    def receive(self, task: Task, result: Any) -> Outcome:
        if task.action != "cut" or task.term > 1:
            return self._topology.receive(task, result)
        wait_until(lambda: min(self._versions()) > result.step or None)
        lost = self._topology._servers.primaries[1]
        assert lost.process is not None
        os.kill(lost.process.process_id, signal.SIGKILL)
        replaced = self._topology.replace(lost.task("watch"))
        assert replaced is not None
        outcome = self._topology.receive(task, result)
        return replace(outcome, pending=replaced.pending | outcome.pending)


def test_a_cut_that_is_heard_of_after_its_term_is_not_waited_for(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_epochs=1)
    config = replace(config, servers=ServersConfig(replicas=1))
    run(config, tmp_path / "run", topologies={"push_pull": LosesServerBeforeItSaves})
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=1)
    assert not was_set_back(tmp_path)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.by_hand)])
def test_a_killed_server_takes_the_run_back_to_the_last_checkpoint(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_struck_servers(tmp_path, f"server {number}", replicas=0, topology=NotesVersions)
    assert causes(tmp_path / "run") == [f"server {number} lost"]
    [recovery] = records(tmp_path / "run", "recovery")
    saved = [record["samples"] for record in records(tmp_path / "run", "checkpoint")]
    assert recovery["samples"] in (0, *saved)
    assert_cost_is_told(tmp_path, caplog.text)


def assert_cost_is_told(directory: Path, log: str) -> None:
    """The log says how many updates are lost: those after the checkpoint that anybody knows of."""
    said = re.search(r"run set back to its last checkpoint step=(\d+) updates_lost=(\d+)", log)
    assert said is not None
    step, num_lost = map(int, said.groups())
    lost = records(directory / "run", "recovery")[0]["time"]
    told = [line["step"] for line in records(directory / "run", "train") if line["time"] < lost]
    known = json.loads(file_of_versions(str(directory / "run")).read_text())
    assert max(*told, *known) <= step + num_lost <= 46


@pytest.mark.parametrize(
    "names",
    [
        ["server 0"],
        pytest.param(["server 1"], marks=pytest.mark.by_hand),
        ["server 0", "server 1"],
    ],
)
def test_replicas_take_over_and_nothing_is_lost(tmp_path: Path, names: list[str]) -> None:
    run_with_struck_servers(tmp_path, *names, replicas=1)
    assert sorted(causes(tmp_path / "run")) == [f"{name} lost" for name in names]
    assert not was_set_back(tmp_path)


class EndsNode(StrikesServers):
    """A topology in which a node ends that has a server."""

    def __init__(self, plan: RunPlan, *, node: AddedNode, **how: Any) -> None:
        super().__init__(plan, names=(), **how)
        self._node = node

    def _strike(self) -> None:
        processes = [hand.process for hand in self._topology._servers.primaries]
        assert self._node.node_id in {process.node_id for process in processes if process}
        self._node.kill()


def test_replicas_take_over_where_a_node_ends_with_a_server(
    tmp_path: Path, second_node: AddedNode
) -> None:
    """It may have the replica of another one, and workers."""
    config = small_config(tmp_path, strategy="push_pull")
    cluster = ClusterConfig(placement="SPREAD", cpus_per_server=0.5)
    config = replace(config, servers=ServersConfig(replicas=1), cluster=cluster)
    others = placement_group([{"CPU": 6}])  # Of the 8 of the first node: the second one has 2.
    assert others.wait(10)
    make = partial(EndsNode, node=second_node)
    try:
        run(config, tmp_path / "run", topologies={"push_pull": make})
    finally:
        remove_placement_group(others)
    assert final(tmp_path / "run").manifest.cut.position == DONE
    assert not was_set_back(tmp_path)


class TellsOf(StrikesServers):
    """Leaves a file when something was done after the strike; workers wait for it."""

    def __init__(self, plan: RunPlan, *, file: Path, action: str, **how: Any) -> None:
        make_strategy = partial(waits_for_file, file, before_step=15)
        super().__init__(plan, make_strategy=make_strategy, **how)
        self._file = file
        self._action = action

    def receive(self, task: Task, result: Any) -> Outcome:
        if task.action == self._action and self.has_struck:
            self._file.touch()
        return super().receive(task, result)


def waits_for_file(file: Path, *arguments: Any, before_step: int, **named: Any) -> Any:
    strategy = push_pull_strategy(*arguments, **named)
    marker = file.with_name(f"waits-{named['number']}")
    return ActsBefore(
        strategy, before_step, marker, lambda: wait_until(lambda: file.exists() or None)
    )


def test_a_lost_replica_is_replaced_also_when_the_first_checkpoint_is_gone(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    keeps_one = replace(config.checkpoint, every_samples=12, keep=1)
    config = replace(config, servers=ServersConfig(replicas=1), checkpoint=keeps_one)
    tells = partial(TellsOf, file=tmp_path / "attached", action="attach")
    make = partial(tells, names=["replica 1"], step=20)
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert not (tmp_path / "run" / "checkpoints" / "step-000000000000").exists()
    assert final(tmp_path / "run").manifest.cut.position == DONE
    assert causes(tmp_path / "run") == ["server 1 lost"]
    assert not was_set_back(tmp_path)


def test_a_server_lost_with_its_replica_takes_the_run_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("server 1", "replica 1")
    run_with_struck_servers(tmp_path, *names, replicas=1, topology=NotesVersions)
    assert_cost_is_told(tmp_path, caplog.text)


def test_a_server_that_hangs_is_ended_and_its_replica_takes_over(tmp_path: Path) -> None:
    run_with_struck_servers(tmp_path, "server 0", replicas=1, number=signal.SIGSTOP)
    assert causes(tmp_path / "run") == ["server 0 lost"]
    assert not was_set_back(tmp_path)


class PartsServers(TellsOf):
    """The connection between servers is cut, once in a run, while server 0 is stopped and something
    is on its way to it: whether that is heard, nobody learns.
    """

    def _follow_up(self) -> None:
        processes = [hand.process for hand in self._topology._servers.primaries]
        first, second = (process.process_id for process in processes if process is not None)
        try:
            wait_until(partial(with_unread, first, second))
            for connection in connections.between(first, second):
                connection.cut()
        finally:
            os.kill(first, signal.SIGCONT)


def with_unread(process_id: int, sender: int) -> bool | None:
    """True once the sender has said something to the process, which that has not read."""
    found = connections.between(process_id, sender)
    return any(connection.num_unread for connection in found) or None


def test_servers_whose_connection_is_cut_begin_a_term_and_lose_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    parts = partial(PartsServers, file=tmp_path / "begun", action="term")
    make = partial(parts, names=["server 0"], number=signal.SIGSTOP)
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert final(tmp_path / "run").manifest.cut.position == DONE
    assert "servers did not reach one another term=1; another one begins" in caplog.text
    assert causes(tmp_path / "run") == []
    assert not was_set_back(tmp_path)


class Pauses(StrikesServers):
    """The driver does nothing for longer than a server may take to answer."""

    def _follow_up(self) -> None:
        threading.Event().wait(PULSE_S + 2 * PATIENCE_S)


PATIENCE_S = 1.0


def test_a_driver_that_pauses_takes_no_server_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_crew, "LEAST_PATIENCE_S", PATIENCE_S)
    config = small_config(tmp_path, strategy="push_pull")
    config = replace(config, servers=ServersConfig(replicas=1))
    make = partial(Pauses, names=[])
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert causes(tmp_path / "run") == []
    assert final(tmp_path / "run").manifest.cut.position == DONE
