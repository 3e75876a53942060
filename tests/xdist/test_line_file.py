"""Lines that cannot be written are written later, each once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xdist.line_file import LineFile


def read(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_wait_while_their_directory_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, away = tmp_path / "run", tmp_path / "away"
    directory.mkdir()
    file = LineFile(directory / "lines")
    file.append({"number": 1})
    directory.rename(away)
    file.append({"number": 2})
    file.append({"number": 3}, {"number": 4})
    assert len(caplog.records) == 1
    away.rename(directory)
    file.append({"number": 5})
    assert read(file.path) == [{"number": number} for number in range(1, 6)]


def test_a_line_that_was_cut_short_by_a_full_disk_is_written_anew(tmp_path: Path) -> None:
    """A largest file size is refused to a process as a full disk is: in the middle of a write."""
    code = """
import resource, sys
from pathlib import Path
from xdist.line_file import LineFile
file = LineFile(Path(sys.argv[1]))
file.append({"number": 1})
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, unlimited[1]))
file.append({"number": 2})
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
file.append({"number": 3})
"""
    path = tmp_path / "lines"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [1, 2, 3]
