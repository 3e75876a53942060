"""Checkpoints that synchronous workers write beside their training, and what is given up."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datapipe.batch import Batch
from datapipe.position import Position
from tests.recorded import kill_self
from tests.small_runs import causes, final, records, run, small_config
from tests.strategies import Wrapped
from xdist import checkpoint
from xdist.computation import BatchSums
from xdist.flat import FlatModel
from xdist.strategies import Share
from xdist.topologies import RunPlan
from xdist.topologies.all_reduce import AllReduceTopology, all_reduce_strategy

pytestmark = [
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("cluster"),
]


class DiesAsItWrites(Wrapped):
    """A strategy whose process is killed, once in a run, as its second share is being written and
    the next step is made.
    """

    def __init__(self, strategy: Any, marker: Path) -> None:
        """marker: a file that tells what was being written."""
        super().__init__(strategy)
        self._marker = marker
        self._num_saves = 0
        self._trains_on = threading.Event()

    def save(self, share: Share) -> None:
        self._num_saves += 1
        if self._num_saves == 2 and not self._marker.exists():
            checkpoint._store = self._write_and_die
        self.strategy.save(share)

    def update(self, batch: Batch, sums: BatchSums) -> None:
        self.strategy.update(batch, sums)
        if self._num_saves == 2:
            self._trains_on.set()

    def _write_and_die(self, url: str, payload: object) -> None:
        assert payload
        self._trains_on.wait()
        self._marker.write_text(url)
        kill_self()


def dying(marker: Path, plan: RunPlan, flat: FlatModel, *, number: int, **named: Any) -> Any:
    strategy = all_reduce_strategy(plan, flat, number=number, **named)
    return DiesAsItWrites(strategy, marker) if number == 1 else strategy


def test_a_worker_that_is_killed_as_it_writes_costs_that_checkpoint_and_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="all_reduce", num_workers=2)
    config = replace(config, num_epochs=6)
    make_strategy = partial(dying, tmp_path / "marker")
    topology = partial(AllReduceTopology, make_strategy=make_strategy)
    run(config, tmp_path / "run", topologies={"all_reduce": topology})
    assert causes(tmp_path / "run") == ["worker 1 lost"]
    assert final(tmp_path / "run").manifest.cut.position == Position(epoch=6)
    step = Path((tmp_path / "marker").read_text()).parent.name
    saved = [Path(record["path"]).name for record in records(tmp_path / "run", "checkpoint")]
    assert step not in saved
    assert f"checkpoint given up step={int(step.split('-')[1])}: worker 1 is gone" in caplog.text
    assert len(saved) > 2
