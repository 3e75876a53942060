"""The command line of datapipe, in this process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from datapipe.__main__ import main
from datapipe.index import ShardIndex


def test_index_then_info(
    small_index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        shutil.copy(small_index.shard_url(number), tmp_path)
    assert main(["index", str(tmp_path), "--out", str(tmp_path / "index")]) == 0
    assert main(["info", str(tmp_path / "index")]) == 0
    assert "samples  40" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["index", "info"])
def test_an_empty_directory_is_one_line_and_exit_code_2(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
