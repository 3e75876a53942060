"""The command line of datapipe, in this process."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datapipe.__main__ import main
from datapipe.index import ShardIndex
from tests.datapipe.file_server import FileServer
from tests.datapipe.small_sets import write_set


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


def test_shards_whose_packing_did_not_end_are_refused(
    small_index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = Path(shutil.copy(small_index.shard_url(0), tmp_path))
    (tmp_path / "packing-unfinished").write_text("train")
    for arguments in ([tmp_path], [shard], [tmp_path, "--out", tmp_path / "index"]):
        assert main(["index", *map(str, arguments)]) == 2
        assert "packing ended before the data set was complete" in capsys.readouterr().err
    assert main(["index", str(shard), "--out", str(tmp_path / "index")]) == 0


def test_a_name_that_cannot_be_printed_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "caf\udce9"
    write_set(directory, num_samples=2, samples_per_shard=None)
    assert main(["info", str(directory)]) == 2
    assert capsys.readouterr().err.startswith("error: 'utf-8' codec can't encode")


def test_a_refused_url_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileServer(tmp_path) as server:
        server.refused[""] = 403
        assert main(["index", server.url]) == 2
    assert capsys.readouterr().err.startswith(f"error: {server.url}: cannot be read: 403")


def test_an_interrupted_run_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    with FileServer(tmp_path) as server:
        server.held.add("a.tar")
        process = subprocess.Popen(
            [sys.executable, "-m", "datapipe", "index", f"{server.url}/a.tar", "--out", tmp_path],
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert server.asked.wait(timeout=30)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "interrupted; the same command starts over\n"
