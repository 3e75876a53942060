"""Runs whose disk is full for a while, wherever they write: nothing that was trained is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from datapipe.position import Position
from tests.recorded import Recording, recorded_topology
from tests.small_runs import NUM_TRAIN, causes, final, records, run, small_config
from xdist.config import TrainConfig
from xdist.driver import MakeTopology
from xdist.topologies import Outcome, RunPlan, Task
from xdist.topologies.push_pull import PushPullTopology
from xdist.worker_messages import WorkerReport

pytestmark = [
    pytest.mark.faults,
    pytest.mark.long,  # A storage is given time.
    pytest.mark.ray,
    pytest.mark.timeout(180),
    pytest.mark.usefixtures("cluster"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(directory)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


class FillsItsDisk:
    """A topology whose disk is full, to the last byte, from its second checkpoint until so many
    writes have failed.
    """

    def __init__(self, plan: RunPlan, *, make: MakeTopology, num_failures: int) -> None:
        self._topology = make(plan)
        self._ballast = Path(plan.run_dir).parent / "ballast"
        self._num_saved = 0
        self._num_left = num_failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._topology, name)

    def receive(self, task: Task, result: Any) -> Outcome:
        written = result.written if isinstance(result, WorkerReport) else result
        if getattr(written, "unsaved", None) is not None:
            self._num_left -= 1
            if self._num_left == 0:
                self._ballast.unlink()
        outcome: Outcome = self._topology.receive(task, result)
        self._num_saved += len(outcome.saved)
        if self._num_saved >= 2 and self._num_left and not self._ballast.exists():
            fill(self._ballast)
        return outcome


def fill(file: Path) -> None:
    """Write it until its file system is full."""
    with file.open("wb", buffering=0) as opened:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    opened.write(bytes(size))


@pytest.mark.by_hand
def test_a_synchronous_run_goes_on(
    tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="all_reduce")
    [make] = recorded_topology(tmp_path / "recording").values()
    run_on(disk, config, make, caplog)
    Recording(tmp_path / "recording").check(num_samples=NUM_TRAIN, num_epochs=config.num_epochs)


def test_an_asynchronous_run_goes_on(
    tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path, strategy="push_pull")
    run_on(disk, config, PushPullTopology, caplog)


def run_on(
    disk: Path, config: TrainConfig, make: MakeTopology, said: pytest.LogCaptureFixture
) -> None:
    full = partial(FillsItsDisk, make=make, num_failures=2)
    run(config, disk / "run", topologies={config.strategy: full})
    last = final(disk / "run")
    assert last.manifest.cut.position == Position(epoch=config.num_epochs)
    last.verify()
    assert not any(cause.endswith("lost") for cause in causes(disk / "run"))
    assert "No space left on device" in said.text
    trained = records(disk / "run", "train")
    assert max(record["step"] for record in trained) == last.manifest.cut.step
    assert (disk / "run" / "tensorboard").is_dir()
