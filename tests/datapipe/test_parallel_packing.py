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
from datapipe.packing import Packing, label_names
from datapipe.parallel_packing import pack_shards
from tests.datapipe.small_sources import OPTIONS, files_in, images_in, write_photos

ROOT = Path(__file__).parents[2]


def packing_of(photos: Path, output: Path) -> Packing:
    images = images_in(photos)
    return Packing(
        images, directory=str(output), names=label_names(images), known_labels=None, options=OPTIONS
    )


def finish(photos: Path, output: Path, *, num_processes: int = 1) -> int:
    """Write what is missing and finish; how many shards were written."""
    packing = packing_of(photos, output)
    jobs = packing.jobs()
    for _ in pack_shards(jobs, num_processes=num_processes, on_images=lambda _: None):
        pass
    packing.finish()
    return len(jobs)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, 5 a shard. Read only."""
    return write_photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that packing the photos gives."""
    output = tmp_path_factory.mktemp("packed") / "out"
    finish(photos, output)
    return files_in(output)


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
