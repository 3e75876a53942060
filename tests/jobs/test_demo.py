"""The demo, as `make demo` starts it, in a copy of the clone and on few scenes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from guard import descendants

from datapipe.scenes.making import ScenesConfig, ensure_scenes
from tests.clusters import ROOT, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

START_LIMIT_S = 150
LARGEST_UPLOAD_BYTES = 100 * 2**20
SURROUNDINGS = {
    "RAY_ADDRESS": "127.0.0.1:5",
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:5",
    "http_proxy": "http://127.0.0.1:9",
}
"""Somebody else's cluster, which does not answer, and a proxy that does not know this machine."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo needs of a clone, and images of a user that are too large to upload."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("datapipe", "jobs", "xdist"):
        shutil.copytree(ROOT / name, clone / name)
    (clone / "photos").mkdir()
    with (clone / "photos" / "photo.raw").open("wb") as file:
        file.truncate(LARGEST_UPLOAD_BYTES + 1)
    return clone


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a few scenes in the place of the built-in ones: ten epochs of 2 steps."""
    home = tmp_path_factory.mktemp("home")
    cache = home / ".cache" / "xdist"
    made = ensure_scenes(cache, ScenesConfig(num_train=64, num_evaluation=16))
    made.train.parent.rename(cache / ScenesConfig().directory_name())
    return home


@dataclass(frozen=True)
class Demo:
    """A demo that runs in a clone."""

    process: subprocess.Popen[bytes]
    output: Path

    def wait_for(self, command: str) -> dict[int, str]:
        """The processes that it started, once one that begins so is among them."""

        def find() -> dict[int, str] | None:
            found = self.descendants()
            return found if any(one.startswith(command) for one in found.values()) else None

        return wait_until(find, limit_s=START_LIMIT_S)

    def descendants(self) -> dict[int, str]:
        """The processes that it started, and theirs, with their command lines."""
        return {one: command_line(one) for one in descendants(self.process.pid)}


@contextmanager
def demo(
    clone: Path, home: Path, output: Path, *, prepare: Callable[[], object] | None = None
) -> Iterator[Demo]:
    """A demo, ended with the block. `prepare` is called in its process before it starts."""
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "jobs/demo.py"],
            cwd=clone,
            env={**os.environ, **SURROUNDINGS, "HOME": str(home)},
            stdout=log,
            stderr=log,
            preexec_fn=prepare,
        )
    try:
        yield Demo(process, output)
    finally:
        process.terminate()
        process.wait()


def heed_interrupts() -> None:
    """A background process of a shell ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignore_hangups() -> None:
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def command_line(process_id: int) -> str:
    """The command of a process; empty once it has ended."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def wait_for_the_end_of(processes: dict[int, str]) -> None:
    wait_until(lambda: None if any(map(command_line, processes)) else "ended", limit_s=40)


def head_directory(processes: dict[int, str]) -> Path:
    words = [word for command in processes.values() for word in command.split()]
    return Path(next(word for word in words if word.startswith("--temp-dir=")).partition("=")[2])


@pytest.mark.long
def test_the_demo_scores_in_surroundings_of_all_kinds(
    clone: Path, home: Path, tmp_path: Path
) -> None:
    with demo(clone, home, tmp_path / "output", prepare=ignore_hangups) as running:
        wait_until(lambda: "starting" in running.output.read_text() or None)
        running.process.send_signal(signal.SIGHUP)
        assert running.process.wait(START_LIMIT_S) == 0
    summary = json.loads(running.output.read_text().splitlines()[-1])
    assert set(summary) == {"run_dir", "map100", "map100_prevalence", "seconds"}
    assert (Path(summary["run_dir"]) / "curves.png").exists()


@pytest.mark.faults
def test_an_interrupt_leaves_nothing_but_the_run(clone: Path, home: Path, tmp_path: Path) -> None:
    with demo(clone, home, tmp_path / "output", prepare=heed_interrupts) as running:
        started = running.wait_for("ray::Worker")
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(40) == 130
    lines = running.output.read_text().splitlines()
    assert lines[-1] == "interrupted; the Ray head is ended"
    run_dir = lines[-2].removeprefix("the run so far is in ")
    assert (Path(run_dir) / "config.json").exists()
    assert not [one for one in started if command_line(one)]
    assert not head_directory(started).exists()


@pytest.mark.faults
def test_a_demo_that_is_killed_leaves_no_head(clone: Path, home: Path, tmp_path: Path) -> None:
    with demo(clone, home, tmp_path / "output") as running:
        started = running.wait_for("python jobs/jft_async.py")
        running.process.kill()
    wait_for_the_end_of(started)
    assert not head_directory(started).exists()


def test_a_home_that_cannot_be_written_gives_one_line(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with demo(clone, tmp_path / "file" / "home", tmp_path / "output") as running:
        assert running.process.wait(60) == 2
    _, error = running.output.read_text().splitlines()
    assert error.startswith("error: the synthetic scenes cannot be written")
    assert "set HOME" in error
