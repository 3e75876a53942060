"""Jobs on a small data set, with a small network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagenet_sync import PRESETS as SYNC_PRESETS
from jft_async import PRESETS as ASYNC_PRESETS

from tests.small_runs import write_run_data
from xdist import command_line

SMALL = ("--model.width", "0.0625", "--model.middle-modules", "0", "--data.image-size", "16")
SMALL_DATA = ("--data.block-size", "4", "--batch-size", "4", "--num-workers", "2")


def data_options(directory: Path) -> list[str]:
    data = write_run_data(directory, single_label=True)
    return ["--data.train", data.train, "--data.evaluation", str(data.evaluation)]


def main(arguments: Sequence[str], *, job: str = "imagenet_sync") -> int:
    """The job's main in this process, on the test run's cluster."""
    presets = SYNC_PRESETS if job == "imagenet_sync" else ASYNC_PRESETS
    options = [*SMALL, *SMALL_DATA, *arguments]
    return command_line.main(job, presets, default="cifar", description="", arguments=options)
