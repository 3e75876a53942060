"""Faults in every phase of a run: `make test-faults`. Processes are really killed, at planned
moments.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
import torch
from local_head import LocalHead

from datapipe.position import Position
from tests import connections
from tests.clusters import ROOT, AddedNode, wait_until
from tests.small_runs import Fault, causes, faulty, final, records, run, small_config, weights_of
from tests.strategies import ActsBefore, Wrapped
from xdist.config import ClusterConfig
from xdist.errors import NotEnoughResources
from xdist.servers_config import ServersConfig
from xdist.strategies import UpdateStrategy, outbox
from xdist.strategies.push_pull import Servers
from xdist.topologies import Outcome, RunPlan, Task, actors, nodes, server_crew
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.crew import PULSE_S
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy
from xdist.worker import WorkerReport

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("cluster"),
]

MakeStrategy = Callable[..., UpdateStrategy]
SMALL_BUCKETS = 1 << 10
DONE = Position(epoch=2)


class StrikesServers:
    """A topology in which servers get a signal, once in a run, when it has come to a step."""

    def __init__(
        self, plan: RunPlan, *, names: Collection[str], number: int = signal.SIGKILL, step: int = 12
    ) -> None:
        """names: as "server 0" and "replica 0"."""
        self._topology = PushPullTopology(plan)
        self._names = names
        self._number = number
        self._step = step
        self.has_struck = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        is_due = isinstance(result, WorkerReport) and result.progress.step >= self._step
        if is_due and not self.has_struck:
            self.has_struck = True
            for hand in list(self._topology._servers):
                is_primary = hand in self._topology._servers.primaries
                name = f"{'server' if is_primary else 'replica'} {hand.number}"
                if name in self._names:
                    assert hand.process is not None
                    os.kill(hand.process.process_id, self._number)
        return self._topology.receive(task, result)


def run_with_struck_servers(
    directory: Path, *names: str, replicas: Literal[0, 1], **how: Any
) -> None:
    """A run to its end, whose places are all done once."""
    config = small_config(directory, strategy="push_pull")
    config = replace(config, servers=ServersConfig(replicas=replicas))
    make = partial(StrikesServers, names=names, **how)
    run(config, directory / "run", topologies={"push_pull": make})
    assert final(directory / "run").manifest.cut.position == DONE


def was_set_back(directory: Path) -> bool:
    """Whether any update was made twice: whether a record tells of an earlier step."""
    steps = [record["step"] for record in records(directory / "run", "train")]
    return steps != sorted(steps)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_server_takes_the_run_back_to_the_last_checkpoint(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_struck_servers(tmp_path, f"server {number}", replicas=0)
    assert causes(tmp_path / "run") == [f"server {number} lost"]
    [recovery] = records(tmp_path / "run", "recovery")
    saved = [record["samples"] for record in records(tmp_path / "run", "checkpoint")]
    assert recovery["samples"] in (0, *saved)
    assert re.search(r"run set back to its last checkpoint step=\d+ updates_lost=\d+", caplog.text)


@pytest.mark.parametrize("names", [["server 0"], ["server 1"], ["server 0", "server 1"]])
def test_replicas_take_over_and_nothing_is_lost(tmp_path: Path, names: list[str]) -> None:
    run_with_struck_servers(tmp_path, *names, replicas=1)
    assert sorted(causes(tmp_path / "run")) == [f"{name} lost" for name in names]
    assert not was_set_back(tmp_path)


class TellsOf(StrikesServers):
    """Leaves a file when something was done after the strike; workers wait for it."""

    def __init__(self, plan: RunPlan, *, file: Path, action: str, **how: Any) -> None:
        super().__init__(plan, **how)
        make_strategy = partial(waits_for_file, file, before_step=15)
        self._topology = PushPullTopology(plan, make_strategy=make_strategy)
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
    run_with_struck_servers(tmp_path, "server 1", "replica 1", replicas=1)
    assert re.search(r"run set back to its last checkpoint step=\d+ updates_lost=\d+", caplog.text)


def test_a_server_that_hangs_is_ended_and_its_replica_takes_over(tmp_path: Path) -> None:
    run_with_struck_servers(tmp_path, "server 0", replicas=1, number=signal.SIGSTOP)
    assert causes(tmp_path / "run") == ["server 0 lost"]
    assert not was_set_back(tmp_path)


class PartsServers(TellsOf):
    """The connection between servers is cut, once in a run, while server 0 is stopped and something
    is on its way to it: whether that is heard, nobody learns.
    """

    def receive(self, task: Task, result: Any) -> Outcome:
        had_struck = self.has_struck
        outcome = super().receive(task, result)
        if self.has_struck and not had_struck:
            first, second = self._topology._servers.primaries
            assert first.process is not None
            assert second.process is not None
            first_id, second_id = first.process.process_id, second.process.process_id
            unread = partial(with_unread, first_id, second_id)
            try:
                wait_until(unread)
                for connection in connections.between(first_id, second_id):
                    connection.cut()
            finally:
                os.kill(first_id, signal.SIGCONT)
        return outcome


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

    def receive(self, task: Task, result: Any) -> Outcome:
        had_struck = self.has_struck
        outcome = super().receive(task, result)
        if self.has_struck and not had_struck:
            threading.Event().wait(PULSE_S + 2 * PATIENCE_S)
        return outcome


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


@dataclass
class DyingHandle:
    """The handle of a server whose caller is killed at its n-th call of a method."""

    server: Any
    method: str
    is_before: bool
    number: int
    marker: Path

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.server, name)
        if name != self.method or self.marker.exists():
            return method
        self.number -= 1
        return method if self.number else self

    def remote(self, *arguments: Any) -> Any:
        self.marker.touch()
        if not self.is_before:
            ray.get(getattr(self.server, self.method).remote(*arguments))
        os.kill(os.getpid(), signal.SIGKILL)


class DiesInPush(Wrapped):
    """A strategy whose process is killed around a call of server 0."""

    def __init__(self, strategy: Any, *, method: str, is_before: bool, marker: Path) -> None:
        super().__init__(strategy)
        self._dying = partial(DyingHandle, method=method, is_before=is_before, marker=marker)

    def join(self, membership: Servers) -> None:
        lead, *others = membership.servers
        dying: Any = self._dying(lead, number=4)
        self.strategy.join(replace(membership, servers=(dying, *others)))


def dies_in_push(method: str, is_before: bool, marker: Path, *arguments: Any, **named: Any) -> Any:
    """Worker 1 is killed around a call of server 0. Pushes have several parts."""
    vars(outbox)["BUCKET_BYTES"] = SMALL_BUCKETS
    strategy = push_pull_strategy(*arguments, **named)
    if named["number"] != 1:
        return strategy
    return DiesInPush(strategy, method=method, is_before=is_before, marker=marker)


@pytest.mark.parametrize(
    ("method", "is_before"),
    [("stage", True), ("stage", False), ("push", True), ("push", False)],
    ids=["before", "staged_on_one_server", "staged_everywhere", "committed"],
)
def test_a_worker_killed_within_a_push_loses_and_repeats_nothing(
    tmp_path: Path, method: str, is_before: bool
) -> None:
    servers = ServersConfig(shared_memory=method == "push")  # There nothing is sent to be staged.
    config = small_config(tmp_path, strategy="push_pull", servers=servers)
    marker = tmp_path / "struck"
    make_strategy = partial(dies_in_push, method, is_before, marker)
    make = partial(PushPullTopology, make_strategy=make_strategy)
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert marker.exists()
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == DONE


def test_a_stopped_asynchronous_worker_loses_its_leases_and_is_replaced(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    fault = Fault(1, 5, str(tmp_path / "struck"), signal.SIGSTOP)
    make = partial(PushPullTopology, make_strategy=faulty(push_pull_strategy, fault))
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == DONE


def dies_at_start(
    make_strategy: MakeStrategy, marker: Path, *arguments: Any, **named: Any
) -> UpdateStrategy:
    """Worker 1 is killed when its strategy stands, before its first update."""
    strategy = make_strategy(*arguments, **named)
    if named["number"] == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return strategy


@pytest.mark.parametrize("strategy", ["all_reduce", "push_pull"])
def test_a_worker_killed_while_it_starts_is_replaced(tmp_path: Path, strategy: str) -> None:
    config = small_config(tmp_path, strategy=strategy)
    is_sync = strategy == "all_reduce"
    make_strategy = all_reduce_strategy if is_sync else push_pull_strategy
    dies = partial(dies_at_start, make_strategy, tmp_path / "struck")
    topology = AllReduceTopology if is_sync else PushPullTopology
    run(config, tmp_path / "run", topologies={strategy: partial(topology, make_strategy=dies)})
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == DONE


def dies_at_every_start(
    make_strategy: MakeStrategy, directory: Path, num_deaths: int, *arguments: Any, **named: Any
) -> UpdateStrategy:
    """The first so many workers are killed when their strategies stand."""
    strategy = make_strategy(*arguments, **named)
    number = len(list(directory.glob("death-*")))
    if number < num_deaths:
        (directory / f"death-{number}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return strategy


@pytest.mark.parametrize("strategy", ["all_reduce", "push_pull"])
def test_the_only_worker_may_die_more_than_once_while_it_starts(
    tmp_path: Path, strategy: str
) -> None:
    config = small_config(tmp_path, strategy=strategy, num_workers=1)
    is_sync = strategy == "all_reduce"
    make_strategy = all_reduce_strategy if is_sync else push_pull_strategy
    dies = partial(dies_at_every_start, make_strategy, tmp_path, 3)
    topology = AllReduceTopology if is_sync else PushPullTopology
    run(config, tmp_path / "run", topologies={strategy: partial(topology, make_strategy=dies)})
    assert causes(tmp_path / "run") == ["worker 0 lost"] * 3
    assert final(tmp_path / "run").manifest.cut.position == DONE


def test_a_killed_last_rank_costs_no_sample(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce")
    fault = Fault(worker=1, own_step=25, marker=str(tmp_path / "struck"))
    make = partial(AllReduceTopology, make_strategy=faulty(all_reduce_strategy, fault))
    run(config, tmp_path / "run", topologies={"all_reduce": make})
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == DONE


DRIVER = """
import pickle, sys
from pathlib import Path
import ray
from tests.small_runs import run
ray.init(log_to_driver=False)
run(pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("strategy", ["all_reduce", "push_pull"])
def test_a_killed_driver_leaves_no_actor_and_the_run_resumes(
    tmp_path: Path, cluster: LocalHead, strategy: str
) -> None:
    config = small_config(tmp_path, strategy=strategy, num_workers=1)
    run(config, tmp_path / "undisturbed")
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    arguments = [str(tmp_path / "config"), str(tmp_path / "run")]
    command = [sys.executable, "-c", DRIVER, *arguments]
    environment = {**cluster.environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        wait_until(lambda: (metrics.exists() and '"checkpoint"' in metrics.read_text()) or None)
        process.kill()
    wait_until(lambda: "free" if ray.available_resources().get("CPU") == 8 else None)
    assert subprocess.call(command, cwd=ROOT, env=environment) == 0
    assert records(tmp_path / "run", "start")[-1]["step"] > 0
    resumed, undisturbed = final(tmp_path / "run"), final(tmp_path / "undisturbed")
    assert resumed.manifest.cut == undisturbed.manifest.cut
    assert torch.equal(weights_of(resumed), weights_of(undisturbed))


class Holder:
    """Holds CPUs of the first node."""

    def ready(self) -> None:
        """Return when it holds them."""


def ends_node(
    node: AddedNode, on_node: str, directory: Path, num_workers: int, *arguments: Any, **named: Any
) -> Any:
    """The worker on one node ends the other one, or its own, once the one elsewhere is at work:
    that one makes one push, and then holds what it has leased.
    """
    strategy, at_work = push_pull_strategy(*arguments, **named), directory / "at-work"
    if ray.get_runtime_context().get_node_id() != on_node:
        return ActsBefore(strategy, 2, at_work, threading.Event().wait)

    def end_node() -> None:
        wait_until(lambda: num_workers == 1 or at_work.exists() or None)
        node.end()

    return ActsBefore(strategy, 5, directory / "struck", end_node)


def on_first_node(first_node: str, make_strategy: MakeStrategy, plan: RunPlan) -> PushPullTopology:
    return PushPullTopology(replace(plan, servers_node=first_node), make_strategy=make_strategy)


class LosesAServerToo:
    """A topology that loses a server with the first worker."""

    def __init__(self, topology: PushPullTopology) -> None:
        self._topology = topology
        self._has_struck = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def replace(self, lost: Task) -> Outcome | None:
        if not self._has_struck:
            self._has_struck = True
            process = self._topology._servers.lead.process
            assert process is not None
            os.kill(process.process_id, signal.SIGKILL)
        return self._topology.replace(lost)


def run_with_a_node_that_ends(
    tmp_path: Path,
    node: AddedNode,
    *,
    on_node: str,
    held: int,
    num_workers: int,
    loses_server: bool = False,
) -> None:
    """Workers of 1.5 CPUs each: the first node has room for what `held` leaves of its 8."""
    actor_class: Any = ray.remote(Holder)
    holder = actor_class.options(num_cpus=held).remote()
    ray.get(holder.ready.remote())
    cluster = ClusterConfig(cpus_per_worker=1.5, wait_s=10)
    config = small_config(tmp_path, strategy="push_pull", cluster=cluster, num_workers=num_workers)
    make_strategy = partial(ends_node, node, on_node, tmp_path, num_workers)
    make = partial(on_first_node, nodes.here(), make_strategy)

    def make_all(plan: RunPlan) -> Any:
        return LosesAServerToo(make(plan)) if loses_server else make(plan)

    try:
        run(config, tmp_path / "run", topologies={"push_pull": make_all})
    finally:
        ray.kill(holder)


def test_the_others_finish_when_a_lost_node_leaves_no_room(
    tmp_path: Path, second_node: AddedNode
) -> None:
    on_node = nodes.here()
    run_with_a_node_that_ends(tmp_path, second_node, on_node=on_node, held=6, num_workers=2)
    assert len(causes(tmp_path / "run")) == 1
    assert final(tmp_path / "run").manifest.cut.position == DONE


def test_a_run_that_is_set_back_goes_on_with_as_many_workers_as_there_is_room_for(
    tmp_path: Path, second_node: AddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "PLACING_LIMIT_S", 2.0)
    run_with_a_node_that_ends(
        tmp_path, second_node, on_node=nodes.here(), held=6, num_workers=2, loses_server=True
    )
    assert sorted(causes(tmp_path / "run"))[0] == "server 0 lost"
    assert final(tmp_path / "run").manifest.cut.position == DONE


def test_when_nobody_is_left_and_there_is_no_room_the_run_says_so(
    tmp_path: Path, second_node: AddedNode
) -> None:
    on_node = second_node.node_id
    with pytest.raises(NotEnoughResources, match=r"worker 0 lost, nobody is left, .* within 10 s"):
        run_with_a_node_that_ends(tmp_path, second_node, on_node=on_node, held=7, num_workers=1)
