"""A run of the driver under fire: workers and servers are killed, one after the other, each when
all are whole again; on the cluster of RAY_ADDRESS.

Two workers train a small network on two servers, each with a replica. All gradients are the same,
so that the weights tell how many updates are in them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import deque
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from tests.benchmarks.async_fire import End, lost_and_double, recoveries
from tests.benchmarks.async_log import GRADIENT, Logged, PushLog, SameGradient, Waits
from tests.clusters import AddedNode
from tests.small_runs import NUM_LABELS, NUM_TRAIN, final, run, small_config, weights_of
from xdist.config import CheckpointConfig, ClusterConfig, OptimizerConfig, TrainConfig
from xdist.flat import FlatModel
from xdist.servers_config import ServersConfig
from xdist.topologies import Outcome, RunPlan, Task, nodes
from xdist.topologies.nodes import Process
from xdist.topologies.push_pull import PushPullTopology, push_pull_strategy
from xdist.worker import initial_model
from xdist.worker_messages import WorkerReport

STEP_S = 0.1
"""That a worker waits before each push."""
NODE = "node"


@dataclass(frozen=True)
class Request:
    """One run."""

    strikes: tuple[str, ...]
    """Who is killed, in turn: `worker 1`, `server 0`, `node`."""
    node: dict[str, Any] | None = None
    """Fields of the `AddedNode` that `node` is."""
    steps_of_a_strike: int = 300
    """Updates that the run has for each strike, and before the first one."""


class UnderFire:
    """A topology whose processes are killed: the next one whenever all are whole."""

    def __init__(
        self, plan: RunPlan, *, request: Request, log: PushLog, over: Path, make_strategy: Any
    ) -> None:
        """over: a file that is made when everybody was struck and all are whole again."""
        self._topology = PushPullTopology(plan, make_strategy=make_strategy)
        self._strikes = deque(request.strikes)
        self._node = None if request.node is None else AddedNode(**request.node)
        self._log = log
        self._over = over
        self._have_pushed: set[int] = set()
        """Lives of workers that did so since the last strike."""
        self._struck: set[Process] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        if isinstance(result, WorkerReport) and result.num_steps:
            self._have_pushed.add(task.life)
        outcome = self._topology.receive(task, result)
        if self._is_whole():
            self._go_on()
        return outcome

    def _is_whole(self) -> bool:
        """Whether whoever was struck is gone, all servers have replicas, and workers push."""
        servers, workers = self._topology._servers, self._topology._workers
        return (
            servers.is_led
            and len(servers._attached) == len(servers.primaries)
            and all(hand.life in self._have_pushed for hand in workers)
            and self._struck.isdisjoint(hand.process for hand in (*servers, *workers))
        )

    def _go_on(self) -> None:
        if not self._strikes:
            self._over.touch()
            return
        who = self._strikes.popleft()
        self._have_pushed.clear()
        self._log.add("strike", who)
        processes = self._processes()
        if who == NODE and self._node is not None:
            node_id = self._node.node_id
            processes = {name: p for name, p in processes.items() if p.node_id == node_id}
            if not any(name.startswith("server") for name in processes):
                raise RuntimeError("no server is on the node, but for replicas")
            self._struck = set(processes.values())
            self._node.kill()
        else:
            self._struck = {processes[who]}
            nodes.kill(processes[who])

    def _processes(self) -> dict[str, Process]:
        """Of the workers, and of the servers that are no replicas."""
        workers = {f"worker {hand.number}": hand.process for hand in self._topology._workers}
        servers = {
            f"server {hand.number}": hand.process for hand in self._topology._servers.primaries
        }
        hands = {**workers, **servers}
        return {name: process for name, process in hands.items() if process is not None}


def struck_strategy(
    log: PushLog, over: Path, config: TrainConfig, flat: FlatModel, *, number: int
) -> Any:
    """The strategy of a worker under fire."""
    strategy = push_pull_strategy(config, flat, number=number)
    waits = Waits(SameGradient(strategy, flat), STEP_S, over=over)
    return Logged(waits, log, number=number)


def config_of(directory: Path, request: Request) -> TrainConfig:
    """Plain SGD, whose updates add up."""
    return replace(
        small_config(directory, strategy="push_pull"),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1.0, momentum=0.0, l2=0.0),
        servers=ServersConfig(replicas=1),
        checkpoint=CheckpointConfig(every_samples=10**6, evaluate_every=0),
        cluster=ClusterConfig(max_recoveries=10**6, placement="SPREAD", cpus_per_server=1),
        num_epochs=10**6,
        max_steps=(len(request.strikes) + 1) * request.steps_of_a_strike,
        report_every_steps=1,
    )


def end_of(run_dir: Path, config: TrainConfig) -> End:
    """What the last checkpoint of a run says."""
    saved = final(run_dir)
    cut = saved.manifest.cut
    first = FlatModel(initial_model(config, num_classes=NUM_LABELS)).weights
    applied = ((first - weights_of(saved)) / GRADIENT).round()
    assert cut.num_samples == config.num_places(NUM_TRAIN)
    return End(cut.step, cut.num_samples, int(applied.min()), int(applied.max()))


def measured(request: Request) -> dict[str, Any]:
    """Drive the run to its end."""
    with tempfile.TemporaryDirectory(prefix="bench-async-") as name:
        directory = Path(name)
        log, over = PushLog(f"{directory}/log"), directory / "over"
        config = config_of(directory, request)
        make = partial(
            UnderFire,
            request=request,
            log=log,
            over=over,
            make_strategy=partial(struck_strategy, log, over),
        )
        run(config, directory / "run", topologies={"push_pull": make})
        lines, end = log.read(), end_of(directory / "run", config)
    num_lost, num_double = lost_and_double(lines, end, num_samples=NUM_TRAIN)
    return {
        "recoveries": [asdict(recovery) for recovery in recoveries(lines)],
        "lost_updates": num_lost,
        "double_updates": num_double,
        "num_updates": end.version,
    }


def main(request: Request) -> None:
    """Measure it."""
    ray.init(log_to_driver=False)
    sys.stdout.write(json.dumps(measured(request)) + "\n")


if __name__ == "__main__":
    main(Request(**json.loads(sys.argv[1])))
