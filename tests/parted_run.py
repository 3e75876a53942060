"""A recorded run whose network parts at a step: python -m tests.parted_run DIRECTORY

The configuration, and what a worker does before step 10, are in DIRECTORY/arguments.pkl.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import ray

from tests.recorded import Planned, recorded_topology
from tests.small_runs import run


def main(directory: Path) -> None:
    ray.init(log_to_driver=False)
    config, act = pickle.loads((directory / "arguments.pkl").read_bytes())
    topologies = recorded_topology(directory / "recording", [Planned("part", None, 10, act)])
    run(config, directory / "run", topologies=topologies)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
