"""Writing shards: limits, whole files or none, the same bytes again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from datapipe.errors import BadLabels, MissingIndex, PackingError
from datapipe.index import ensure_index
from datapipe.labels import Label, read_labels, write_labels
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import raw_images, write_set


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_set(tmp_path / name, num_samples=7, samples_per_shard=3)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_shard_ends_at_its_size(tmp_path: Path) -> None:
    index = write_shards(
        raw_images(60),
        directory=str(tmp_path),
        labels=[Label(0, "x", 0.5)],
        prefix="part",
        samples_per_shard=None,
        shard_bytes=40_000,
    )
    assert index.num_samples == 60
    sizes = [entry.bytes for entry in index.shards]
    assert all(40_000 <= size < 60_000 for size in sizes[:-1])  # a tar ends in up to 20 kB of zeros
    assert len(sizes) > 1
    assert index.shards[0].shard == "part-00000.tar"
    assert read_labels(str(tmp_path / "labels.json")) == (Label(0, "x", 0.5),)


def test_an_interrupted_write_leaves_no_partial_file_and_no_manifest(tmp_path: Path) -> None:
    def interrupted() -> Iterator[RawImage]:
        yield from raw_images(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(
            interrupted(),
            directory=str(tmp_path),
            labels=None,
            prefix="train",
            samples_per_shard=4,
            shard_bytes=None,
        )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["packing-unfinished", "train-00000.tar"]
    with pytest.raises(MissingIndex, match="packing ended before the data set was complete"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))
    write_set(tmp_path, num_samples=5, samples_per_shard=4)
    assert not (tmp_path / "packing-unfinished").exists()
    ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


def test_a_directory_that_holds_a_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, num_samples=2, samples_per_shard=None)
    with pytest.raises(PackingError, match=r"index\.json exists; choose another directory"):
        write_set(tmp_path, num_samples=2, samples_per_shard=None)


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match="no images to pack"):
        write_set(tmp_path, num_samples=0, samples_per_shard=None)


def test_labels_round_trip(tmp_path: Path) -> None:
    labels = (Label(0, "a b", 0.25), Label(1, "\u00e9t\u00e9", 1.0))
    write_labels(str(tmp_path / "labels.json"), labels)
    assert read_labels(str(tmp_path / "labels.json")) == labels


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no such file"),
        ("{", "not a list"),
        ('[{"id": 0}]', "not a list"),
        ('[{"id": 1, "name": "a", "weight": 1}]', "ids are not 0, 1, 2"),
        (
            '[{"id": 0, "name": "a", "weight": 1}, {"id": 1, "name": "a", "weight": 1}]',
            "two labels have the same name",
        ),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "labels.json").write_text(text)
    with pytest.raises(BadLabels, match=reason):
        read_labels(str(tmp_path / "labels.json"))
