"""One turn of bench-checkpoint in this process: a worker's own writer, and torch.save with fsync.

python -m tests.benchmarks.checkpoint_ours DIRECTORY SAVES
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from datapipe.position import Position
from tests.benchmarks.checkpoint_state import make_model, make_state, update
from xdist import checkpoint
from xdist.checkpoint import Cut, Manifest, Part
from xdist.flat import FlatModel
from xdist.share_writer import Piece, ShareWriter
from xdist.state import STATISTICS, RangeState

STEPS_BEFORE = 20
"""Updates before the first checkpoint."""


def main(directory: Path, saves: int) -> None:
    flat = make_model()
    state = make_state(flat)
    writer, run_dir = ShareWriter(), str(directory / "run")
    checkpoint.make_directory(run_dir)
    writer.reserve(pieces_of(state, flat))
    for _ in range(STEPS_BEFORE):
        update(state)
    stalls, writes, torch_saves = [], [], []
    parts: tuple[Part, ...] = ()
    for step in range(1, saves + 2):
        update(state)
        url = checkpoint.checkpoint_url(run_dir, step)
        began = time.perf_counter()
        writer.save(step, url, pieces_of(state, flat))
        stalls.append(time.perf_counter() - began)
        parts = writer.written(step).parts
        writes.append(time.perf_counter() - began)
        update(state)
        torch_saves.append(timed(lambda: save_with_torch(state, directory / "checkpoint.pt")))
    cut = Cut(saves + 1, 0, Position(), is_final=False)
    manifest = Manifest(cut, flat.layout, parts, {}, {}, checkpoint.versions())
    checkpoint.publish(checkpoint.checkpoint_url(run_dir, cut.step), manifest)
    found = {
        "first_stall_s": stalls[:1],
        "stall_s": stalls[1:],
        "write_s": writes[1:],
        "torch_save_s": torch_saves[1:],
        "resume_s": [timed(lambda: resume(run_dir, state))],
        "megabytes": [sum(tensor.nbytes for tensor in state.tensors().values()) / 1e6],
    }
    (directory / "result.json").write_text(json.dumps(found))


def pieces_of(state: RangeState, flat: FlatModel) -> list[Piece]:
    """What a worker that is alone saves."""
    name = checkpoint.range_part(state.start, state.stop)
    return [
        Piece(name, state.start, state.stop, state.tensors()),
        Piece(checkpoint.STATISTICS_PART, 0, 0, {STATISTICS: flat.statistics}),
    ]


def save_with_torch(state: RangeState, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state.tensors(), file)
        file.flush()
        os.fsync(file.fileno())


def resume(run_dir: str, state: RangeState) -> None:
    """Find the last checkpoint, verify it, and take its tensors over."""
    found = checkpoint.latest(run_dir)
    assert found is not None
    tensors = found.read_range(0, state.stop)
    for name, tensor in state.tensors().items():
        tensor.copy_(tensors[name])


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
