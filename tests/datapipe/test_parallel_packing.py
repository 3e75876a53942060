"""Packing in several processes: killed, interrupted and failing, at planned images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from datapipe.errors import PackingError
from datapipe.parallel_packing import pack_shards
from tests.datapipe.small_sources import (
    files_in,
    finish,
    images_in,
    packing_of,
    write_photos,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("num_processes", "num_written"), [(1, 4), (2, None)])
def test_the_same_command_goes_on_after_sigkill(
    photos: Path,
    tmp_path: Path,
    uninterrupted: dict[str, bytes],
    num_processes: int,
    num_written: int | None,
) -> None:
    output = tmp_path / "out"
    died = subprocess.run(
        [
            *(sys.executable, "-m", "tests.datapipe.killed_packing"),
            *(str(photos), str(output), "22", str(num_processes)),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,  # which also waits for the processes that it has started
        timeout=50,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not (output / "index.json").exists()
    written = finish(photos, output)
    assert written == num_written or (num_written is None and 1 <= written <= 6)
    assert files_in(output) == uninterrupted


def on_image(number: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A callback that acts at one image."""
    done = count(1)

    def on_images(_: int) -> None:
        if next(done) == number:
            act()

    return on_images


def test_an_interrupt_leaves_neither_processes_nor_half_a_file(
    photos: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    jobs = packing_of(photos, tmp_path / "out").jobs()
    with pytest.raises(KeyboardInterrupt):
        list(pack_shards(jobs, num_processes=2, on_images=on_image(12, interrupt)))
    assert multiprocessing.active_children() == []
    assert not [name for name in files_in(tmp_path / "out") if name.endswith(".partial")]
    assert finish(photos, tmp_path / "out") < 8
    assert files_in(tmp_path / "out") == uninterrupted


def test_a_killed_process_is_told_and_the_same_command_goes_on(
    photos: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    def kill_one() -> None:
        process = multiprocessing.active_children()[0]
        process.kill()
        process.join()

    jobs = packing_of(photos, tmp_path / "out").jobs()
    with pytest.raises(PackingError, match=r"process ended with exit code -9: .* goes on"):
        list(pack_shards(jobs, num_processes=2, on_images=on_image(1, kill_one)))
    assert multiprocessing.active_children() == []
    finish(photos, tmp_path / "out", num_processes=2)
    assert files_in(tmp_path / "out") == uninterrupted


def test_a_process_tells_of_a_bad_image(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", num_images=10)
    bad = images_in(photos)[3].path
    bad.write_bytes(b"no image")
    jobs = packing_of(photos, tmp_path / "out").jobs()
    with pytest.raises(PackingError, match=f"{bad.name}: not a JPEG, PNG or WebP image; repair it"):
        list(pack_shards(jobs, num_processes=2, on_images=lambda _: None))
