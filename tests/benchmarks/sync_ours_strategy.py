"""The strategy of this project's workers in bench-sync: all-reduce, logged."""

from __future__ import annotations

from typing import Any

from datapipe.batch import Batch
from tests.benchmarks.sync_log import StepLog
from tests.benchmarks.sync_request import Request
from tests.strategies import Wrapped
from xdist.computation import BatchSums
from xdist.flat import FlatModel
from xdist.topologies import RunPlan
from xdist.topologies.all_reduce import all_reduce_strategy


class Logged(Wrapped):
    """A strategy whose finished updates are logged."""

    def __init__(self, strategy: Any, log: StepLog) -> None:
        super().__init__(strategy)
        self._log = log

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.strategy.update(batch, sums)
        self._log.finished(self.strategy.progress.step)

    def kill_if_planned(self, *_of_forward: object) -> None:
        """Called after every forward, where the peers' processes are killed too: their all-reduce
        begins with backward.
        """
        self._log.kill_before(self.strategy.progress.step + 1)


def logged_strategy(request: Request, plan: RunPlan, flat: FlatModel, **named: Any) -> Any:
    """The strategy of one worker, logged, whose process may end before an update."""
    strategy = all_reduce_strategy(plan, flat, **named)
    logged = Logged(strategy, request.step_log("ours", named["number"]))
    flat.model.register_forward_hook(logged.kill_if_planned)
    return logged
