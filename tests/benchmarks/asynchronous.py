"""Asynchronous training: updates a second against Ray's example, stragglers, killed processes.

PYTHONPATH=jobs python -m tests.benchmarks.asynchronous --rounds 3

Eight workers that compute nothing push gradients of the whole Xception, 22.9 million parameters, to
servers that make RMSProp updates and keep an average: through shared memory, also in bfloat16, and
through Ray's object store, in bfloat16. Ray's documented example does the same with dicts of
tensors and torch's RMSprop. They take turns with one another and with the bare update, round after
round; a ratio is the median of the rounds' ratios.

Then four workers of a small network train, one of them slow, where waiting stands for computing;
and two train while workers, servers and a node are killed. The last line is one JSON object. What
could not be measured is null in it, and the notes say why.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch
import tyro
from local_head import LocalHead
from rich.console import Console

from tests.benchmarks import async_pushes, async_ray_example, async_recovery, async_stragglers
from tests.benchmarks.async_figures import (
    KERNEL,
    ONE_WORKER,
    OURS,
    OURS_BF16,
    OURS_OBJECT_STORE,
    OVERLAP_0,
    OVERLAP_1,
    RAY_EXAMPLE,
    TORCH,
    TORCH_OPTIM,
    Results,
    figures,
    missed,
    table_of_figures,
    table_of_rates,
)
from tests.benchmarks.async_launch import VARIABLES, PartFailed, last_line_of, result_of
from tests.clusters import QUICK_HEALTH_CHECKS, added_node

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    OURS: {},
    OURS_BF16: {"wire": "bfloat16"},
    OURS_OBJECT_STORE: {"shared_memory": False, "wire": "bfloat16"},
}
"""Fields of `ServersConfig`."""
STORE_WARM_UP_S = 30.0
"""Of what goes through the object store, ours and Ray's example: so long each process meets pages
of it for the first time.
"""
KERNEL_ROUNDS = 12
"""Of the bare update, each time; the fastest counts. It moves as much as the memory of the machine
gives, of which others may take a part for a while.
"""
NUM_CPUS = 8
"""By name: the machine needs not so many."""
PART_LIMIT_S = 120.0
"""Besides what is asked for."""


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    rounds: int = 3
    """How often each way to make updates is timed."""
    seconds: float = 6.0
    """For how long, each time."""
    num_servers: int = 1
    """Of ours, where updates are timed."""
    num_workers: int = 8
    """That push, without compute, to ours and to Ray's example."""
    straggler_seconds: float = 24.0
    """How long the four workers train."""
    kills: int = 3
    """How often a worker and each server is killed."""


@dataclass
class Bench:
    """What all parts share."""

    arguments: Arguments
    console: Console
    results: Results

    def measure(self) -> None:
        """All parts, one after the other."""
        with LocalHead(num_cpus=NUM_CPUS, variables=VARIABLES) as head:
            for number in range(self.arguments.rounds):
                self.results.rounds.append({})
                self._round(head, backwards=number % 2 == 1)
                self.console.print(f"round {number + 1} of {self.arguments.rounds}")
            self._try("stragglers", lambda: self._stragglers(head))
            self._try("processes_lost", lambda: self._processes_lost(head))
        self._try("node_lost", self._node_lost)

    def _try(self, name: str, part: Callable[[], None]) -> None:
        try:
            part()
        except PartFailed as error:
            self.results.failures[name] = str(error)
            self.console.print(str(error), style="red", markup=False)
        else:
            self.console.print(f"{name} done")

    def _round(self, head: LocalHead, *, backwards: bool) -> None:
        """Every way once; the other way round every second time."""
        ways: dict[str, Callable[[], None]] = {
            RAY_EXAMPLE: lambda: self._ray_example(head),
            **{name: self._pushing(head, name) for name in VARIANTS},
            "overlap": lambda: self._overlap(head),
            KERNEL: self._kernel,
        }
        for name in reversed(ways) if backwards else ways:
            self._try(name, ways[name])

    def _note(self, name: str, rate: float) -> None:
        self.results.rounds[-1][name] = rate

    def _ray_example(self, head: LocalHead) -> None:
        arguments = self.arguments
        request = async_ray_example.Request(
            seconds=arguments.seconds,
            num_workers=arguments.num_workers,
            warm_up_s=STORE_WARM_UP_S,
        )
        self._note(RAY_EXAMPLE, self._updates_per_second("ray_example", request, head))

    def _pushing(self, head: LocalHead, name: str) -> Callable[[], None]:
        how = {"num_workers": self.arguments.num_workers, "servers": VARIANTS[name]}
        if name == OURS_OBJECT_STORE:
            how["warm_up_s"] = STORE_WARM_UP_S
        return lambda: self._note(name, self._pushes(head, **how))

    def _pushes(self, head: LocalHead, **how: Any) -> float:
        arguments = self.arguments
        request = async_pushes.Request(
            seconds=arguments.seconds, num_servers=arguments.num_servers, **how
        )
        return self._updates_per_second("pushes", request, head)

    def _overlap(self, head: LocalHead) -> None:
        """One worker that computes as long as a push takes."""
        alone = self._pushes(head, num_workers=1)
        self._note(ONE_WORKER, alone)
        for name, overlap in ((OVERLAP_0, 0), (OVERLAP_1, 1)):
            servers = {"overlap": overlap}
            rate = self._pushes(head, num_workers=1, servers=servers, compute_s=1 / alone)
            self._note(name, rate)

    def _kernel(self) -> None:
        """The update without servers, and by torch."""
        options = [f"--rounds={KERNEL_ROUNDS}"]
        values = last_line_of(
            "update_kernel", options, environment=os.environ, limit_s=PART_LIMIT_S
        )
        self._note(KERNEL, values["kernel_updates_s"])
        for name in (TORCH, TORCH_OPTIM):
            self._note(name, max(values[f"{name}_updates_s"], values[f"{name}_updates_s_1"]))

    def _updates_per_second(self, part: str, request: Any, head: LocalHead) -> float:
        limit_s = PART_LIMIT_S + STORE_WARM_UP_S + self.arguments.seconds
        result = result_of(part, request, environment=head.environment, limit_s=limit_s)
        rate: float = result["updates_per_s"]
        return rate

    def _stragglers(self, head: LocalHead) -> None:
        seconds = self.arguments.straggler_seconds
        self.results.stragglers = result_of(
            "stragglers",
            async_stragglers.Request(seconds),
            environment=head.environment,
            limit_s=4 * (PART_LIMIT_S + seconds),
        )

    def _processes_lost(self, head: LocalHead) -> None:
        strikes = ("worker 1", "server 1", "server 0") * self.arguments.kills
        self.results.processes_lost = result_of(
            "recovery",
            async_recovery.Request(strikes),
            environment=head.environment,
            limit_s=PART_LIMIT_S * (1 + len(strikes)),
        )

    def _node_lost(self) -> None:
        variables = {**VARIABLES, **QUICK_HEALTH_CHECKS}
        with (
            LocalHead(num_cpus=NUM_CPUS, variables=variables) as head,
            added_node(head, num_cpus=NUM_CPUS) as node,
        ):
            self.results.node_lost = result_of(
                "recovery",
                async_recovery.Request((async_recovery.NODE,), node=asdict(node)),
                environment=head.environment,
                limit_s=2 * PART_LIMIT_S,
            )


def machine() -> Mapping[str, Any]:
    """Where it was measured."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def main(arguments: Arguments) -> int:
    """Measure, and show it; 1 when a limit is missed."""
    bench = Bench(arguments, Console(stderr=True), Results())
    bench.measure()
    results, values = bench.results, figures(bench.results)
    console = Console()
    console.print(table_of_rates(results))
    console.print(table_of_figures(values))
    facts = {
        "num_servers": arguments.num_servers,
        "num_workers": arguments.num_workers,
        **machine(),
    }
    console.print(" ".join(f"{name}={value}" for name, value in facts.items()))
    for name, reason in results.failures.items():
        console.print(f"{name}: {reason.splitlines()[-1]}", style="red", markup=False)
    for line in missed(values):
        console.print(line, style="red")
    sys.stdout.write(json.dumps({**values, **facts}) + "\n")
    return 1 if missed(values) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
