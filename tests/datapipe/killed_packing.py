"""A process that packs, and is killed after a number of images: photos, output, images, processes.

Its output ends when it and all that it started are gone.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path

from datapipe.packing import Packing, label_names
from datapipe.parallel_packing import pack_shards
from tests.datapipe.small_sources import OPTIONS, images_in


def main(photos: str, output: str, num_images: str, num_processes: str) -> None:
    """Pack, and die on the way."""
    images = images_in(Path(photos))
    packing = Packing(
        images, directory=output, names=label_names(images), known_labels=None, options=OPTIONS
    )
    done = count(1)

    def on_images(_: int) -> None:
        if next(done) == int(num_images):
            os.kill(os.getpid(), signal.SIGKILL)

    jobs = packing.jobs()
    for _ in pack_shards(jobs, num_processes=int(num_processes), on_images=on_images):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
