"""Writing shards: limits, whole files or none, the same bytes again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from datapipe.errors import BadLabels, MissingIndex, PackingError
from datapipe.index import ShardIndex, ensure_index, index_shards
from datapipe.labels import Label, read_labels, write_labels
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import encode, picture, raw_images, write_set


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


def interrupted(images: list[RawImage]) -> Iterator[RawImage]:
    yield from images
    raise KeyboardInterrupt


def write(
    directory: Path,
    images: Iterable[RawImage],
    *,
    prefix: str = "train",
    labels: Iterable[Label] | None = None,
) -> ShardIndex:
    return write_shards(
        images,
        directory=str(directory),
        labels=labels,
        prefix=prefix,
        samples_per_shard=4,
        shard_bytes=None,
    )


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_interrupted_write_leaves_no_partial_file_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted(raw_images(5)))
    assert names_in(tmp_path) == ["packing-unfinished", "train-00000.parquet", "train-00000.tar"]
    with pytest.raises(MissingIndex, match="packing ended before the data set was complete"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


def test_what_an_interrupted_write_left_does_not_outlive_the_next(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, interrupted(raw_images(13)), prefix="part.a")
    assert "part.a-00002.tar" in names_in(tmp_path)
    for name in ("part.a-00003.parquet", "part.a-00003.tar.partial", "index.json.partial"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not ours")
    write(tmp_path, raw_images(5))
    of_shards = [f"train-0000{number}.{kind}" for number in (0, 1) for kind in ("parquet", "tar")]
    assert names_in(tmp_path) == ["index.json", "notes.txt", *of_shards]
    ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))


@pytest.mark.parametrize("is_marked", [False, True])
def test_tars_of_others_are_never_overwritten(tmp_path: Path, is_marked: bool) -> None:
    if is_marked:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, interrupted(raw_images(5)), prefix="other")
    (tmp_path / "train-00000.tar").write_bytes(b"precious")
    before = names_in(tmp_path)
    with pytest.raises(PackingError, match=r"holds train-00000\.tar; choose an empty directory"):
        write(tmp_path, raw_images(5))
    assert (tmp_path / "train-00000.tar").read_bytes() == b"precious"
    assert names_in(tmp_path) == before


def test_a_set_whose_labels_could_not_be_written_is_unfinished(tmp_path: Path) -> None:
    def labels() -> Iterator[Label]:
        yield Label(0, "x", 0.5)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, raw_images(5), labels=labels())
    with pytest.raises(MissingIndex, match="packing ended before the data set was complete"):
        ensure_index(str(tmp_path), index_directory=str(tmp_path / "index"))
    write(tmp_path, raw_images(5), labels=[Label(0, "x", 0.5)])
    assert read_labels(str(tmp_path / "labels.json")) == (Label(0, "x", 0.5),)


def test_labels_are_taken_after_the_last_sample(tmp_path: Path) -> None:
    taken: list[str] = []

    def images() -> Iterator[RawImage]:
        yield from raw_images(5)
        taken.append("images")

    def labels() -> Iterator[Label]:
        taken.append("labels")
        yield Label(0, "x", 0.5)

    write(tmp_path, images(), labels=labels())
    assert taken == ["images", "labels"]


def test_a_directory_that_holds_a_set_is_refused(tmp_path: Path) -> None:
    write_set(tmp_path, num_samples=2, samples_per_shard=None)
    with pytest.raises(PackingError, match=r"index\.json exists; choose another directory"):
        write_set(tmp_path, num_samples=2, samples_per_shard=None)


def test_nothing_to_pack_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackingError, match="no images to pack"):
        write_set(tmp_path, num_samples=0, samples_per_shard=None)


def test_the_index_says_what_a_walk_of_the_shards_finds(tmp_path: Path) -> None:
    images = [
        *raw_images(5),
        RawImage(encode(picture(5), "PNG"), "png", (3, 1, 3), "cat/\udce9 \u00e9.png"),
        RawImage(encode(picture(6), "WEBP"), "webp", (), "cat/6.webp"),
        RawImage(b"no image", "jpg", (2**40,)),
    ]
    written = write(tmp_path, images)
    paths = sorted(tmp_path.glob("*.parquet"))
    tables = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    urls = [written.shard_url(number) for number in range(len(written.shards))]
    walked = index_shards(urls, directory_url=str(tmp_path), with_crc32=True)
    assert list(walked.shards) == list(written.shards)
    assert walked.num_labels == written.num_labels == 10
    assert [path.read_bytes() for path in paths] == tables


def test_webdataset_reads_every_sample(tmp_path: Path) -> None:
    images = raw_images(7)
    write(tmp_path, images)
    read = []
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            read += group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))
    assert [sample["jpg"] for sample in read] == [image.payload for image in images]
    assert [json.loads(sample["json"])["labels"] for sample in read] == [
        list(image.label_ids) for image in images
    ]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (RawImage(bytes((1 << 28) + 1), "jpg", ()), "the image takes 268,435,457 bytes; allowed:"),
        (RawImage(b"", "jpg", (10_000_000,) * 105_000), "its list of labels takes 1,"),
    ],
    ids=["image", "labels"],
)
def test_a_sample_that_no_reader_would_take_is_refused(
    tmp_path: Path, image: RawImage, text: str
) -> None:
    with pytest.raises(PackingError, match=text):
        write(tmp_path, [image])


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
