"""Faults in every phase of a run: `make test-faults`. Processes are really killed, at planned
moments; those of servers in `test_server_faults.py`.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from local_head import LocalHead

from datapipe.position import Position
from tests.clusters import ROOT, AddedNode, wait_until
from tests.datapipe.fault_proxy import FaultProxy
from tests.datapipe.file_server import FileServer
from tests.server_versions import EndsAtOneVersion
from tests.small_runs import (
    Fault,
    causes,
    faulty,
    final,
    records,
    run,
    saved_step,
    small_config,
    weights_of,
)
from tests.strategies import ActsBefore, Wrapped
from xdist.config import ClusterConfig, TrainConfig
from xdist.errors import NotEnoughResources
from xdist.flat import FlatModel
from xdist.servers_config import ServersConfig
from xdist.strategies import UpdateStrategy, outbox
from xdist.strategies.push_pull import Servers
from xdist.topologies import Outcome, RunPlan, Task, nodes, room
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy
from xdist.topologies.nodes import Process
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("cluster"),
]

MakeStrategy = Callable[..., UpdateStrategy]
SMALL_BUCKETS = 1 << 10
DONE = Position(epoch=2)


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
    make = partial(EndsAtOneVersion, make_strategy=make_strategy)
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert marker.exists()
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == DONE


def test_a_stopped_asynchronous_worker_loses_its_leases_and_is_replaced(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    fault = Fault(1, 5, str(tmp_path / "struck"), signal.SIGSTOP)
    make = partial(EndsAtOneVersion, make_strategy=faulty(push_pull_strategy, fault))
    run(config, tmp_path / "run", topologies={"push_pull": make})
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == DONE


def wake(process: Process) -> None:
    """Instead of its death, which Ray will see to."""
    os.kill(process.process_id, signal.SIGCONT)


def test_a_stopped_worker_that_wakes_when_it_was_given_up_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stopped before a push, which it makes late."""
    monkeypatch.setattr(nodes, "kill", wake)
    config = small_config(tmp_path, strategy="push_pull")
    fault = Fault(1, 5, str(tmp_path / "struck"), signal.SIGSTOP)
    make = partial(EndsAtOneVersion, make_strategy=faulty(push_pull_strategy, fault))
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


@pytest.mark.parametrize(
    "strategy", ["all_reduce", pytest.param("push_pull", marks=pytest.mark.by_hand)]
)
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


@pytest.mark.by_hand
def test_a_killed_driver_leaves_no_actor_and_the_run_resumes(
    tmp_path: Path, cluster: LocalHead
) -> None:
    """With one asynchronous worker, to the bit; for others see `test_killed_drivers`."""
    config = small_config(tmp_path, strategy="push_pull", num_workers=1)
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


@pytest.mark.by_hand
def test_a_run_that_is_set_back_goes_on_with_as_many_workers_as_there_is_room_for(
    tmp_path: Path, second_node: AddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PLACING_LIMIT_S", 2.0)
    run_with_a_node_that_ends(
        tmp_path, second_node, on_node=nodes.here(), held=6, num_workers=2, loses_server=True
    )
    assert sorted(causes(tmp_path / "run"))[0] == "server 0 lost"
    assert final(tmp_path / "run").manifest.cut.position == DONE


@pytest.mark.by_hand
def test_when_nobody_is_left_and_there_is_no_room_the_run_says_so(
    tmp_path: Path, second_node: AddedNode
) -> None:
    on_node = second_node.node_id
    with pytest.raises(NotEnoughResources, match=r"worker 0 lost, nobody is left, .* within 10 s"):
        run_with_a_node_that_ends(tmp_path, second_node, on_node=on_node, held=7, num_workers=1)


def dies_and_never_starts_again(
    marker: Path, config: TrainConfig, flat: FlatModel, *, number: int
) -> UpdateStrategy:
    if marker.exists():
        raise RuntimeError("this node lacks something")
    strategy = push_pull_strategy(config, flat, number=number)
    return ActsBefore(strategy, 5, marker, partial(os.kill, os.getpid(), signal.SIGKILL))


def test_when_nobody_is_left_and_no_replacement_starts_the_run_says_so(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="push_pull", num_workers=1)
    config = replace(config, cluster=ClusterConfig(wait_s=2))
    make_strategy = partial(dies_and_never_starts_again, tmp_path / "died")
    topologies = {"push_pull": partial(PushPullTopology, make_strategy=make_strategy)}
    with pytest.raises(NotEnoughResources, match="no replacement could start") as caught:
        run(config, tmp_path / "run", topologies=topologies)
    assert str(caught.value).endswith("RuntimeError: this node lacks something")
    assert saved_step(tmp_path / "run") == 4  # What the servers have.


def test_a_read_that_is_given_up_while_it_is_scored_does_not_end_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=1, is_scored=True)
    config = replace(config, checkpoint=replace(config.checkpoint, evaluate_every=1))
    assert config.data.evaluation is not None
    files = FileServer(Path(config.data.evaluation))
    with files, FaultProxy(files.url, {12: "refuse"}) as proxy:
        data = replace(config.data, evaluation=proxy.url, read_retries=0)
        run(replace(config, data=data), tmp_path / "run")
    assert (
        records(tmp_path / "run", "evaluation")[-1]["step"]
        == final(tmp_path / "run").manifest.cut.step
    )
