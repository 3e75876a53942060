"""A recorded run whose network parts at a step: python -m tests.parted_run DIRECTORY

The configuration, and the host whose link is taken down, are in DIRECTORY/arguments.pkl.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import ray

from tests.recorded import Planned, recorded_topology
from tests.small_runs import run
from xdist.topologies import nodes


def main(directory: Path) -> None:
    ray.init(log_to_driver=False)
    config, host = pickle.loads((directory / "arguments.pkl").read_bytes())
    planned = Planned("part", None, 10, host.take_link_down, node_id=nodes.here())
    topologies = recorded_topology(directory / "recording", [planned])
    run(config, directory / "run", topologies=topologies)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
