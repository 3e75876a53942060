"""What bench-async says of what it measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from tests.benchmarks import limits

RAY_EXAMPLE, KERNEL = "ray_example", "kernel"
TORCH, TORCH_OPTIM = "torch_foreach", "torch_optim"
OURS, OURS_BF16, OURS_OBJECT_STORE = "ours", "ours_bf16", "ours_object_store"
ONE_WORKER, OVERLAP_0, OVERLAP_1 = "one_worker", "one_worker_overlap_0", "one_worker_overlap_1"
NAMES = (
    RAY_EXAMPLE,
    OURS,
    OURS_BF16,
    OURS_OBJECT_STORE,
    KERNEL,
    TORCH,
    TORCH_OPTIM,
    ONE_WORKER,
    OVERLAP_0,
    OVERLAP_1,
)
"""Whatever makes updates of all weights; each once in every round."""
ALONE, ASYNCHRONOUS, SYNCHRONOUS = "alone", "asynchronous", "synchronous"
"""How workers of which one is slow make updates: each for itself, and together."""

SMALLEST = {
    "updates_ratio_vs_ray_example": 9.0,
    "updates_ratio_object_store": 7.0,
    "fraction_of_kernel_rate": 0.4,
    "kernel_ratio_vs_torch": 8.0,
    "straggler_efficiency": 0.95,
}
LARGEST = {"server_recovery_s": 2.0, "lost_updates": 0.0, "double_updates": 0.0}
WITHOUT_LIMIT = (
    "kernel_ratio_vs_torch_optim",
    "updates_ratio_bf16",
    "sync_straggler_efficiency",
    "overlap_gain",
    "worker_recovery_s",
    "server_node_recovery_s",
)
AIMS = {"updates_ratio_vs_ray_example": 20.0, "fraction_of_kernel_rate": 0.8}


@dataclass
class Results:
    """What the parts said; None, or not there, is what failed."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    """Updates a second, by `NAMES`."""
    stragglers: Mapping[str, float] | None = None
    """Updates a second of four workers, of which one is slow."""
    processes_lost: Mapping[str, Any] | None = None
    """What `async_recovery` says of a run whose processes are killed."""
    node_lost: Mapping[str, Any] | None = None
    """The same of one that loses a node."""
    failures: dict[str, str] = field(default_factory=dict)
    """Part -> why."""

    def rates(self, name: str) -> list[float]:
        return [each[name] for each in self.rounds if name in each]

    def ratio(self, name: str, to: str) -> float | None:
        """The median of the rounds' ratios."""
        return _median(each[name] / each[to] for each in self.rounds if name in each and to in each)

    def efficiency(self, name: str) -> float | None:
        """The part that remains of what the workers do alone."""
        return None if self.stragglers is None else self.stragglers[name] / self.stragglers[ALONE]

    def recovery_s(self, *names: str) -> float | None:
        """The largest of their medians; None if one of them did not recover once."""
        medians = [_median_or_none(self._seconds(name)) for name in names]
        known = [seconds for seconds in medians if seconds is not None]
        return max(known) if len(known) == len(names) else None

    def largest_recovery_s(self, name: str) -> float | None:
        """Of all times that it was struck."""
        seconds = [value for value in self._seconds(name) if value is not None]
        return max(seconds, default=None)

    def under_fire(self, figure: str) -> float | None:
        """Of all runs whose processes or nodes were killed together."""
        runs = [run for run in (self.processes_lost, self.node_lost) if run is not None]
        return sum(run[figure] for run in runs) if runs else None

    def _seconds(self, name: str) -> list[float | None]:
        runs = (run for run in (self.processes_lost, self.node_lost) if run is not None)
        return [
            each["seconds"] for run in runs for each in run["recoveries"] if each["who"] == name
        ]


def figures(results: Results) -> dict[str, float | None]:
    """What the last line says: medians of the rounds."""
    values = {
        "updates_ratio_vs_ray_example": results.ratio(OURS, RAY_EXAMPLE),
        "updates_ratio_bf16": results.ratio(OURS_BF16, RAY_EXAMPLE),
        "updates_ratio_object_store": results.ratio(OURS_OBJECT_STORE, RAY_EXAMPLE),
        "fraction_of_kernel_rate": results.ratio(OURS, KERNEL),
        "kernel_ratio_vs_torch": results.ratio(KERNEL, TORCH),
        "kernel_ratio_vs_torch_optim": results.ratio(KERNEL, TORCH_OPTIM),
        "straggler_efficiency": results.efficiency(ASYNCHRONOUS),
        "sync_straggler_efficiency": results.efficiency(SYNCHRONOUS),
        "overlap_gain": results.ratio(OVERLAP_1, OVERLAP_0),
        "worker_recovery_s": results.recovery_s("worker 1"),
        "server_recovery_s": results.recovery_s("server 0", "server 1"),
        "server_node_recovery_s": results.recovery_s("node"),
        "lost_updates": results.under_fire("lost_updates"),
        "double_updates": results.under_fire("double_updates"),
        "updates_under_fire": results.under_fire("num_updates"),
        "server_0_recovery_s": results.recovery_s("server 0"),
        "server_1_recovery_s": results.recovery_s("server 1"),
        "server_recovery_s_max": _most(map(results.largest_recovery_s, ("server 0", "server 1"))),
        "worker_recovery_s_max": results.largest_recovery_s("worker 1"),
    }
    for name in NAMES:
        values[f"updates_per_s_{name}"] = _median(results.rates(name))
    for name in (ALONE, ASYNCHRONOUS, SYNCHRONOUS):
        rate = None if results.stragglers is None else results.stragglers[name]
        values[f"straggler_updates_per_s_{name}"] = rate
    return {name: value if value is None else round(value, 3) for name, value in values.items()}


def missed(values: Mapping[str, float | None]) -> list[str]:
    """The limits that are not kept, and the figures that are not there."""
    return limits.missed(values, smallest=SMALLEST, largest=LARGEST, others=WITHOUT_LIMIT)


def table_of_rates(results: Results) -> Table:
    """Updates of all weights, for people."""
    table = Table(
        title="updates a second: medians of the rounds",
        caption="one_worker: alone with its servers; its overlap_0 and overlap_1 wait before each "
        "push for as long as one takes",
    )
    for title in ("what", "median", "least", "most", "x ray_example"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for name in NAMES:
        if rates := results.rates(name):
            numbers = (statistics.median(rates), min(rates), max(rates))
            ratio = results.ratio(name, RAY_EXAMPLE)
            table.add_row(name, *map(_text, (*numbers, ratio)))
    return table


def table_of_figures(values: Mapping[str, float | None]) -> Table:
    """Everything else, with what is wanted."""
    table = Table("figure")
    for title in ("value", "limit", "aim"):
        table.add_column(title, justify="right")
    for name, value in values.items():
        if name.startswith("updates_per_s"):
            continue
        limit = ""
        if name in SMALLEST:
            limit = f"at least {SMALLEST[name]:g}"
        elif name in LARGEST:
            limit = f"at most {LARGEST[name]:g}"
        aim = f"{AIMS[name]:g}" if name in AIMS else ""
        table.add_row(name, _text(value), limit, aim)
    return table


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _median_or_none(values: Iterable[float | None]) -> float | None:
    return _median(value for value in values if value is not None)


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None
