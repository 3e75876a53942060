"""Shards without an index: every sample once an epoch, over all workers, and nothing promised."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from datapipe.batch import Batch
from datapipe.config import DataConfig
from datapipe.errors import MissingShard, TooManyBadSamples, UnreadableShard
from datapipe.index import list_shards
from datapipe.unindexed import unindexed_stream
from tests.datapipe.small_sets import (
    NUM_CLASSES,
    encode,
    labels_of,
    picture,
    write_set,
    write_tar,
)

NUM_SAMPLES = 40


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Seven shards, the last one smaller, as if somebody else had written them."""
    directory = tmp_path / "shards"
    write_set(directory, num_samples=NUM_SAMPLES, samples_per_shard=6)
    for path in directory.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return list_shards(str(directory))


def batches_of(shards: list[str], **changes: Any) -> list[Batch]:
    data = {"max_bad_samples": changes.pop("max_bad_samples", 100)}
    config = DataConfig(train="unused", image_size=16, decode_threads=1, **data)
    arguments: dict[str, Any] = {
        "batch_size": 5,
        "rank": 0,
        "world_size": 1,
        "num_epochs": 1,
        "seed": 3,
        "shuffle_buffer": 8,
        "training": True,
        "num_classes": NUM_CLASSES,
    }
    with unindexed_stream(shards, config, **(arguments | changes)) as stream:
        return list(stream)


def labels_in(batches: list[Batch]) -> list[tuple[int, ...]]:
    """Of the rows that count."""
    return [
        tuple(batch.label_ids[batch.label_offsets[row] : batch.label_offsets[row + 1]].tolist())
        for batch in batches
        for row in torch.flatten(torch.nonzero(batch.sample_weights)).tolist()
    ]


def test_every_sample_once_an_epoch_over_all_workers(shards: list[str]) -> None:
    parts = [batches_of(shards, rank=rank, world_size=3, num_epochs=2) for rank in range(3)]
    labels = [label for batches in parts for label in labels_in(batches)]
    assert sorted(labels) == sorted(2 * [labels_of(number) for number in range(NUM_SAMPLES)])
    for batches in parts:
        assert {tuple(batch.images.shape) for batch in batches} == {(5, 16, 16, 3)}
        assert all(batch.spans == () for batch in batches)
    once = [batches_of(shards, rank=rank, world_size=3) for rank in range(3)]
    ids = {int(sample) for batches in once for batch in batches for sample in batch.sample_ids}
    assert len(ids) == NUM_SAMPLES


def test_the_same_seed_gives_the_same_batches_and_another_epoch_others(shards: list[str]) -> None:
    once, again = batches_of(shards), batches_of(shards)
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one.images, other.images)
    two = batches_of(shards, num_epochs=2)
    assert labels_in(two)[:NUM_SAMPLES] != labels_in(two)[NUM_SAMPLES:]


def test_evaluation_takes_each_shard_in_order(shards: list[str]) -> None:
    labels = labels_in(batches_of(shards[:1], training=False))
    assert labels == [labels_of(number) for number in range(6)]


def test_it_says_what_it_cannot_do(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batches_of(shards)
    assert "without an index: no exact resume" in caplog.text
    assert "python -m datapipe index makes one shards=7" in caplog.text


def test_a_shard_that_ends_early_gives_what_it_holds(
    shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shard = Path(shards[0])
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        labels = labels_in(batches_of(shards))
    assert NUM_SAMPLES - 6 < len(labels) < NUM_SAMPLES
    assert f"shard ends early shard={shard}" in caplog.text


def test_a_damaged_header_is_not_taken_for_the_end(
    shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shard = Path(shards[0])
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        place = tar.getmembers()[4].offset
    content[place + 100] ^= 0xFF
    shard.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        labels = labels_in(batches_of(shards))
    assert len(labels) == NUM_SAMPLES - 4
    assert f"neither a header nor the end of a tar at byte {place}" in caplog.text


@pytest.mark.parametrize("content", [b"", 3000 * b"<html>"])
def test_what_is_no_tar_is_named(shards: list[str], content: bytes) -> None:
    Path(shards[2]).write_bytes(content)
    with pytest.raises(UnreadableShard, match="not a tar"):
        batches_of(shards)


def test_a_second_image_of_one_name_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = encode(picture(1))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("x.jpg", image), ("x.cls", b"1"), ("x.JPG", image)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (batch,) = batches_of([str(tmp_path / "a.tar")])
    assert batch.num_samples == 1
    assert "left out reason=x.JPG: duplicate file name" in caplog.text


def test_bad_samples_have_the_same_budget(tmp_path: Path) -> None:
    image = encode(picture(1))
    write_tar(
        tmp_path / "a.tar",
        {
            "../../x.jpg": image,
            "../../x.cls": b"1",
            "y.jpg": image[: len(image) // 2],
            "y.cls": b"2",
            "z.jpg": image,
            "z.cls": b"-4",
            "w.txt": b"no image",
            "v.pkl": b"cos\nsystem\n(S'touch /tmp/never'\ntR.",
        },
    )
    (batch,) = batches_of([str(tmp_path / "a.tar")])
    assert batch.num_samples == 1
    assert {(bad.key, bad.shard) for bad in batch.corrupt} == {
        ("y", str(tmp_path / "a.tar")),
        ("z", str(tmp_path / "a.tar")),
    }
    with pytest.raises(TooManyBadSamples, match="2 corrupt samples"):
        batches_of([str(tmp_path / "a.tar")], max_bad_samples=1)


def test_a_shard_that_is_gone_is_named(shards: list[str]) -> None:
    with pytest.raises(MissingShard, match=r"absent\.tar"):
        batches_of([*shards, str(Path(shards[0]).with_name("absent.tar"))])


@pytest.mark.parametrize(("rank", "world_size"), [(0, 8), (2, 2), (-1, 2)])
def test_workers_own_whole_shards(shards: list[str], rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="at most 7 of them can read 7 shards"):
        batches_of(shards, rank=rank, world_size=world_size)
