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
from tests.datapipe.small_sets import write_set, write_tar


def copied_shards(index: ShardIndex, directory: Path) -> str:
    """The first two shards of a set, without their index."""
    directory.mkdir()
    for number in range(2):
        shutil.copy(index.shard_url(number), directory)
    return str(directory)


def test_index_verify_info_and_preview_of_one_set(
    small_index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, out = copied_shards(small_index, tmp_path / "shards"), str(tmp_path / "index")
    assert main(["index", shards, "--out", out, "--num-processes", "2"]) == 0
    assert "40 samples in 2 shards, 10 labels; tables made: 2, kept: 0" in capsys.readouterr().out
    assert main(["index", shards, "--out", out, "--num-processes", "1"]) == 0
    assert "tables made: 0, kept: 2" in capsys.readouterr().out
    assert main(["verify", out, "--num-processes", "1"]) == 0
    assert capsys.readouterr().out == (
        "40 samples have no crc32; python -m datapipe index --crc32 adds it\n"
        "40 samples in 2 shards: 0 faults\n"
    )
    assert main(["info", out]) == 0
    assert "samples      40" in capsys.readouterr().out
    assert main(["preview", out, "--out", str(tmp_path / "sheet.png"), "--num", "4"]) == 0
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_crc32_is_computed_when_it_is_asked_for(small_index: ShardIndex, tmp_path: Path) -> None:
    shards = copied_shards(small_index, tmp_path / "shards")
    for option in ([], ["--crc32"], []):
        assert main(["index", shards, "--num-processes", "1", *option]) == 0
        has_crc32 = ShardIndex.open(shards).table(0).has_crc32
        assert has_crc32.all() == (option == ["--crc32"]) or option == []
    assert has_crc32.all()  # a table that knows more is kept


def test_faults_are_printed_and_make_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_set(tmp_path, num_samples=3, samples_per_shard=None)
    shard = bytearray((tmp_path / "train-00000.tar").read_bytes())
    offset = int(index.table(0).offsets[1])
    shard[offset + 300] ^= 1
    (tmp_path / "train-00000.tar").write_bytes(shard)
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        f"train-00000.tar: sample 000001 at byte {offset}: its bytes are not those that were "
        "indexed (crc32 differs)\n3 samples in 1 shards: 1 faults\n"
    )


@pytest.mark.parametrize("command", ["index", "verify", "info", "preview"])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("pipe:touch pwned", "pipe: URLs run a shell command and are refused"),
        ("s9://bucket/set", "Protocol not known: s9"),
        ("nowhere", "nowhere"),
    ],
    ids=["pipe", "protocol", "nowhere"],
)
def test_a_url_of_no_use_is_one_line_and_exit_code_2(
    command: str,
    url: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out = ["--out", "sheet.png"] if command == "preview" else []
    assert main([command, url, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["index"],
        ["preview", "x"],
        ["preview", "x", "--out", "train-00000.tar"],
        ["verify", "x", "--num-processes", "0"],
    ],
)
def test_arguments_of_no_use_are_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m datapipe" in capsys.readouterr().err


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


def test_a_name_that_cannot_be_printed_is_spelled_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "caf\udce9"
    write_set(directory, num_samples=2, samples_per_shard=None)
    assert main(["info", str(directory)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/caf\\udce9\n")


def test_a_refused_url_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileServer(tmp_path) as server:
        server.refused[""] = 403
        assert main(["index", server.url]) == 2
    assert capsys.readouterr().err.startswith(f"error: {server.url}: cannot be read: 403")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_an_interrupted_run_is_one_line_and_exit_code_130(tmp_path: Path, num_shards: int) -> None:
    names = [f"{number}.tar" for number in range(num_shards)]
    for name in names:
        write_tar(tmp_path / name, {})
    with FileServer(tmp_path) as server:
        server.held.update(names)
        command = ["index", server.url, "--out", str(tmp_path), "--num-processes", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "datapipe", *command], stderr=subprocess.PIPE, text=True
        )
        with process:
            assert server.asked.wait(timeout=30)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; the same command goes on"
    assert "Traceback" not in errors
