"""Shards that were made to harm: each is refused or put aside with a message, and runs nothing."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datapipe.__main__ import main
from datapipe.errors import UnsupportedUrl
from datapipe.index import ShardIndex, ensure_index, index_shards
from datapipe.labels import Label, write_labels
from datapipe.position import Position
from datapipe.progress import LogToStderr
from datapipe.reader import SampleReader
from datapipe.stream import SampleStream
from tests.datapipe.small_sets import (
    NUM_CLASSES,
    encode,
    labels_in,
    picture,
    small_config,
    small_order,
    write_tar,
)

GOOD = {
    f"good-{number}.{kind}": content
    for number in range(3)
    for kind, content in (("jpg", encode(picture(number))), ("cls", b"%d" % number))
}
END = sum(512 + -(-len(content) // 512) * 512 for content in GOOD.values())
"""Where the good members end in a tar."""


class Harm:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.mkdir, ("pwned",)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three folders deep, so that a path with ../.. would show."""
    (tmp_path / "a" / "b" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "set")


def run_all(capsys: pytest.CaptureFixture[str]) -> str:
    """What every command prints for the shards of this directory, which must be all that it did."""
    commands = (["index"], ["verify", "--deep"], ["info"], ["preview", "--out", "sheet.png"])
    codes = [main([command, ".", *options]) for command, *options in commands]
    assert codes[0] == codes[2] == codes[3] == 0
    assert codes[1] in (0, 1)
    written = {path.name for path in Path().iterdir()} - {"a.tar", "labels.json"}
    assert written == {"a.parquet", "index.json", "sheet.png"}
    assert [path.name for path in Path("../..").rglob("*") if path.is_dir()] == ["b", "set"]
    output = capsys.readouterr()
    return output.out + output.err


def reasons_of(index: ShardIndex) -> dict[str, str]:
    """Why samples could not be used in one epoch of training, by key."""
    with SampleStream(
        index,
        small_config(index),
        order=small_order(index),
        position=Position(),
        batch_size=2,
        num_lanes=1,
        rank=0,
        world_size=1,
        num_epochs=1,
        training=True,
        num_classes=NUM_CLASSES,
    ) as stream:
        assert sum(batch.num_samples for batch in stream) == 3
        return {sample.key: sample.reason for sample in stream.corrupt}


def open_index() -> ShardIndex:
    return ShardIndex.open(str(Path().resolve()))


def test_a_pickle_is_never_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    harm = pickle.dumps(Harm())
    with pytest.raises(FileNotFoundError):
        pickle.loads(harm.replace(b"pwned", b"p/ned"))  # it would
    pickles = {f"good-0.{kind}": harm for kind in ("pkl", "pyd", "pickle", "pth", "json")}
    write_tar(Path("a.tar"), GOOD | pickles)
    run_all(capsys)
    assert labels_in(open_index()) == [[0], [1], [2]]
    assert reasons_of(open_index()) == {}


@pytest.mark.parametrize("key", ["../../x", "/etc/x", "a/../../../x", "C:\\x", "~/x"])
def test_a_key_is_never_a_path(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(Path("a.tar"), GOOD | {f"{key}.jpg": encode(picture(0))[:-60]})
    output = run_all(capsys)
    assert f"sample {key} at byte" in output
    assert open_index().table(0).keys[3] == key
    assert list(reasons_of(open_index())) == [key]


def as_large(payload: bytes) -> bytes:
    """A JPEG or PNG whose header says 20,000 x 20,000 pixels."""
    side = (20_000).to_bytes(4, "big")
    if payload.startswith(b"\x89PNG"):
        chunk = payload[12:16] + side + side + payload[24:29]
        return payload[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + payload[33:]
    place = payload.index(b"\xff\xc0") + 5
    return payload[:place] + side[2:] + side[2:] + payload[place + 4 :]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_of_400_megapixels_is_not_decoded(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bomb = as_large(encode(picture(0), kind))
    write_tar(Path("a.tar"), GOOD | {"bomb.jpg": bomb, "bomb.cls": b"1"})
    output = run_all(capsys)
    assert "sample bomb at byte" in output
    table = open_index().table(0)
    assert (table.widths[3], table.heights[3]) == (20_000, 20_000)
    reasons = reasons_of(open_index())
    assert list(reasons) == ["bomb"]
    assert "pixels" in reasons["bomb"]


def test_a_label_of_2_to_40_is_no_label(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    label = json.dumps({"labels": [1 << 40]}).encode()
    write_tar(Path("a.tar"), GOOD | {"bad.jpg": encode(picture(0)), "bad.json": label})
    index = index_shards(["a.tar"], directory_url=".")
    assert index.num_labels == 3
    assert "samples have no usable label" in caplog.text
    assert "first='bad' allowed=ids from 0 to 9,999,999" in caplog.text
    run_all(capsys)
    assert reasons_of(open_index()) == {
        "bad": "it has no usable label (allowed: ids from 0 to 9,999,999)"
    }


@pytest.mark.parametrize("count", [1_000_000, 100_000])
def test_a_list_of_a_million_labels_is_bounded(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is larger than any list of labels is not read; of a smaller one, each id counts."""
    label = json.dumps({"labels": [7] * count}).encode()
    write_tar(Path("a.tar"), GOOD | {"bad.jpg": encode(picture(0)), "bad.json": label})
    index = index_shards(["a.tar"], directory_url=".")
    if count == 100_000:
        assert labels_in(index)[3] == [7]
        return
    assert labels_in(index)[3] is None
    assert "members are too large and were left out" in caplog.text
    assert "first='bad.json'" in caplog.text
    assert "allowed_label_bytes=1048576" in caplog.text


def good_shard_with(addition: bytes) -> None:
    write_tar(Path("a.tar"), GOOD)
    Path("a.tar").write_bytes(Path("a.tar").read_bytes()[:END] + addition)


def claiming(kind: bytes, name: str, *, is_pax: bool = False) -> bytes:
    """The header of a member that claims to have 1 TB."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 1 << 40, kind
    return info.tobuf(tarfile.PAX_FORMAT if is_pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "claim",
    [
        claiming(tarfile.REGTYPE, "big.jpg"),
        claiming(tarfile.REGTYPE, "big.jpg", is_pax=True),
        claiming(tarfile.REGTYPE, "big.txt"),
        claiming(tarfile.XHDTYPE, "pax"),
        claiming(tarfile.GNUTYPE_LONGNAME, "name"),
    ],
    ids=["image", "image in pax", "other", "pax header", "long name"],
)
def test_a_tar_that_claims_1_tb_ends_there(
    claim: bytes, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    good_shard_with(claim + bytes(2048))
    index = index_shards(["a.tar"], directory_url=".")
    assert labels_in(index) == [[0], [1], [2]]
    assert "shard ends early" in caplog.text
    run_all(capsys)


def test_headers_in_headers_end_the_shard(caplog: pytest.LogCaptureFixture) -> None:
    """tarfile calls itself for each of them."""
    info = tarfile.TarInfo("x")
    info.type = tarfile.XHDTYPE
    good_shard_with(info.tobuf(tarfile.USTAR_FORMAT) * 5000)
    assert index_shards(["a.tar"], directory_url=".").num_samples == 3
    assert "shard ends early" in caplog.text


def test_html_in_a_label_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["<img src=x onerror=alert(1)>", "\x1b]0;title\x07\u202e", "cat"]
    write_labels("labels.json", [Label(number, name, 0.3) for number, name in enumerate(names)])
    write_tar(Path("a.tar"), GOOD)
    output = run_all(capsys)
    assert names[0] in output  # a terminal does not care
    assert "\\x1b]0;title\\x07\\u202e" in output
    assert "\x1b" not in output


def test_a_shard_of_no_printable_name_is_named_without_harm(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tar(Path("a.tar"), GOOD)
    index_shards(["a.tar"], directory_url=".")
    manifest = Path("index.json").read_text()
    Path("index.json").write_text(manifest.replace('"a.tar"', r'"\u001b[31mred.tar"'))
    assert main(["info", "."]) == 2
    LogToStderr().emit(logging.makeLogRecord({"msg": "shard=%s", "args": ("\x1b[31mred.tar",)}))
    error, warning = capsys.readouterr().err.splitlines()
    assert "not in storage" in error
    assert r"\x1b[31mred.tar; restore" in error
    assert warning == r"shard=\x1b[31mred.tar"


@pytest.mark.parametrize("command", ["index", "verify", "info", "preview"])
def test_a_pipe_url_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "sheet.png"] if command == "preview" else []
    assert main([command, "pipe:mkdir pwned", *out]) == 2
    assert "pipe: URLs run a shell command and are refused" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_a_pipe_url_in_a_manifest_is_refused() -> None:
    write_tar(Path("a.tar"), GOOD)
    index_shards(["a.tar"], directory_url=".")
    for field in ("shard", "index"):
        manifest = json.loads(Path("index.json").read_text())
        manifest["shards"][0][field] = "pipe:mkdir pwned"
        Path("other.json").write_text(json.dumps(manifest))
        index = ShardIndex.open(str(Path("other.json").resolve()))
        reader = SampleReader(index, block_size=1, max_blocks=1)
        with pytest.raises(UnsupportedUrl, match="refused"):
            reader.fetch(np.arange(3))
    with pytest.raises(UnsupportedUrl, match="refused"):
        ensure_index("pipe:mkdir pwned", index_directory="index")
