"""The guard of processes that must not outlive their owner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import guard


def start_guard(directory: Path, script: str) -> subprocess.Popen[bytes]:
    """A guard of a shell script that writes process ids to its standard output."""
    return subprocess.Popen(
        [sys.executable, guard.__file__, str(directory), "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def lines_of(process: subprocess.Popen[bytes], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().decode().strip() for _ in range(count)]


def test_nothing_outlives_the_owner_of_a_guard(tmp_path: Path) -> None:
    directory = tmp_path / "head"
    directory.mkdir()
    orphan = "(setsid sleep 1000 & echo $!)"
    stopped = "sleep 1000 & echo $!; kill -STOP $!"
    with start_guard(directory, f"{orphan}; {stopped}; echo $$; wait") as process:
        process_ids = lines_of(process, 3)
        assert all(Path(f"/proc/{process_id}").exists() for process_id in process_ids)
        process.communicate()
    assert not [one for one in process_ids if Path(f"/proc/{one}").exists()]
    assert not directory.exists()


def test_a_guard_ends_with_its_command(tmp_path: Path) -> None:
    directory = tmp_path / "head"
    directory.mkdir()
    with start_guard(directory, "sleep 1000 & echo $!; exit 3") as process:
        [process_id] = lines_of(process, 1)
        assert process.wait() == 3
    assert not Path(f"/proc/{process_id}").exists()
    assert not directory.exists()


def test_temporary_files_of_a_command_go_with_it(tmp_path: Path) -> None:
    directory = tmp_path / "head"
    directory.mkdir()
    with (
        (tmp_path / "log").open("wb") as log,
        guard.guarded(["mktemp"], directory, os.environ, log) as process,
    ):
        assert process.wait() == 0
    assert Path((tmp_path / "log").read_text()).parent == directory
    assert not directory.exists()
