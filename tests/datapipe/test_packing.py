"""Packing: one result, however the work is shared out, interrupted or resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import fsspec
import pytest

from datapipe.errors import PackingError
from datapipe.index import ShardIndex, ensure_index, index_shards
from datapipe.labels import Label
from datapipe.packing import WHOLE, Packing, PackOptions, PackReport, Part, label_names
from datapipe.parallel_packing import pack_shards
from datapipe.sources import ImageFile
from tests.datapipe.small_sets import encode, labels_in, picture, write_set
from tests.datapipe.small_sources import (
    OPTIONS,
    files_in,
    images_in,
    packing_of,
    write_photos,
)


def pack(
    packing: Packing,
    *,
    part: Part = WHOLE,
    num_processes: int = 1,
    on_images: Callable[[int], None] = lambda _: None,
) -> list[int]:
    """The numbers of the shards that were written."""
    jobs = packing.jobs(part)
    records = pack_shards(jobs, num_processes=num_processes, on_images=on_images)
    return [record.number for record in records]


def pack_all(
    photos: Path, output: Path | str, *, options: PackOptions = OPTIONS, num_processes: int = 1
) -> PackReport:
    packing = packing_of(photos, output, options=options)
    pack(packing, num_processes=num_processes)
    return packing.finish()


def test_the_number_of_processes_does_not_show_in_the_result(
    photos: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    pack_all(photos, tmp_path / "out", num_processes=3)
    assert files_in(tmp_path / "out") == uninterrupted
    assert len(uninterrupted) == 2 * 8 + 2  # shards and tables, the manifest and the labels


def test_parts_in_any_order_give_what_one_command_gives(
    photos: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    written = [pack(packing_of(photos, output), part=Part(i, 3)) for i in (2, 3, 1)]
    assert sorted(number for part in written for number in part) == list(range(8))
    packing_of(photos, output).finish()
    assert files_in(output) == uninterrupted


def test_parts_may_begin_at_the_same_time(
    photos: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    output, together = tmp_path / "out", Barrier(8)

    def run(number: int) -> None:
        together.wait(timeout=50)
        pack(packing_of(photos, output), part=Part(number, 8))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(1, 9)))
    packing_of(photos, output).finish()
    assert files_in(output) == uninterrupted


def test_a_set_with_a_part_missing_is_not_finished(photos: Path, tmp_path: Path) -> None:
    pack(packing_of(photos, tmp_path / "out"), part=Part(1, 4))
    with pytest.raises(PackingError, match=r"6 of 8 shards are not packed yet \(train-00001\.tar"):
        packing_of(photos, tmp_path / "out").finish()
    assert not (tmp_path / "out" / "index.json").exists()


def test_the_tables_say_what_a_walk_of_the_shards_finds(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    for name, content in uninterrupted.items():
        if not name.endswith(".parquet"):
            (tmp_path / name).write_bytes(content)
    packed = ShardIndex.open(str(tmp_path))
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    walked = index_shards(urls, directory_url=str(tmp_path), with_crc32=True)
    assert list(walked.shards) == list(packed.shards)
    assert files_in(tmp_path) == uninterrupted
    assert sum(len(labels or ()) for labels in labels_in(walked)) == 40


def test_a_bad_image_leaves_a_gap_in_the_numbers_and_nothing_else(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    bad = images_in(photos)[7].path
    bad.write_bytes(bad.read_bytes()[:-20])
    report = pack_all(photos, tmp_path / "out", options=replace(OPTIONS, skip_bad=True))
    keys = [key for shard in range(8) for key in report.index.table(shard).keys]
    assert keys == [f"{number:06d}" for number in range(40) if number != 7]
    assert len(report.skipped) == 1
    assert report.skipped[0].startswith(f"{bad.parent.name}/{bad.name}: ")
    assert sum(label.weight for label in report.labels) == pytest.approx(1)


def test_a_repaired_image_does_not_cost_the_shards_that_are_there(tmp_path: Path) -> None:
    photos, output = write_photos(tmp_path / "photos"), tmp_path / "out"
    bad = images_in(photos)[17].path
    good = bad.read_bytes()
    bad.write_bytes(good[:-20])
    with pytest.raises(PackingError, match=f"{bad.name}: .*; repair it, or leave bad images out"):
        pack(packing_of(photos, output))
    bad.write_bytes(encode(picture(99, width=90, height=90)))
    packing = packing_of(photos, output)
    assert pack(packing) == [3, 4, 5, 6, 7]
    assert packing.finish().index.num_samples == 40


def test_a_shard_is_packed_again_if_its_images_or_its_files_changed(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    photos, output = write_photos(tmp_path / "photos"), tmp_path / "out"
    pack(packing_of(photos, output))
    (output / "train-00002.tar").write_bytes(b"cut")
    (output / "train-00004.parquet").unlink()
    (output / "packing-records" / "train-00005.json").write_text("{")
    first = images_in(photos)[0].path
    content = first.read_bytes()
    first.write_bytes(content + b"\n")
    packing = packing_of(photos, output)
    assert pack(packing) == [0, 2, 4, 5]
    first.write_bytes(content)
    packing = packing_of(photos, output)
    assert pack(packing) == [0]
    packing.finish()
    assert files_in(output) == uninterrupted


def test_what_was_left_out_needs_skip_bad_to_the_end(tmp_path: Path) -> None:
    photos, output = write_photos(tmp_path / "photos"), tmp_path / "out"
    images_in(photos)[3].path.write_bytes(b"no image")
    pack(packing_of(photos, output, options=replace(OPTIONS, skip_bad=True)))
    with pytest.raises(PackingError, match="it was left out: give --skip-bad here, too"):
        packing_of(photos, output).finish()
    with pytest.raises(PackingError, match="leave bad images out with --skip-bad"):
        pack(packing_of(photos, output))


def test_a_set_of_bad_images_alone_is_none(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(PackingError, match=r"no image can be used; the first: cat/0\.jpg"):
        pack_all(tmp_path / "photos", tmp_path / "out", options=replace(OPTIONS, skip_bad=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (replace(OPTIONS, prefix="test"), "--prefix was 'train', is 'test'"),
        (replace(OPTIONS, shard_bytes=9), r"size of a shard \(--shard-mb\) in bytes was 12000"),
        (
            replace(OPTIONS, payloads=replace(OPTIONS.payloads, reencode_quality=90)),
            r"treatment of JPEGs .* was 'as it is', is 'quality 90'",
        ),
    ],
)
def test_another_command_is_refused_where_one_was_begun(
    photos: Path, tmp_path: Path, options: PackOptions, text: str
) -> None:
    pack(packing_of(photos, tmp_path / "out"), part=Part(1, 3))
    before = files_in(tmp_path / "out")
    with pytest.raises(PackingError, match=f"unfinished packing of another command: {text}"):
        packing_of(photos, tmp_path / "out", options=options)
    assert files_in(tmp_path / "out") == before


def test_other_images_or_labels_are_refused_where_a_packing_was_begun(
    photos: Path, tmp_path: Path
) -> None:
    pack(packing_of(photos, tmp_path / "out"), part=Part(1, 3))
    labels = [Label(number, f"class{number}", 0.5) for number in range(4)]
    with pytest.raises(PackingError, match="ids or weights of the labels differ; give the command"):
        packing_of(photos, tmp_path / "out", known_labels=labels)
    images = images_in(photos)[::-1]
    with pytest.raises(PackingError, match=r"images, their order \(--seed\) or their labels diff"):
        Packing(
            images,
            directory=str(tmp_path / "out"),
            names=label_names(images),
            known_labels=None,
            options=OPTIONS,
        )


@pytest.mark.parametrize(
    "mark", [b"train", b"\xff", b"3", b'{"format": "datapipe-packing", "version": 2}']
)
def test_what_another_writer_left_is_refused(photos: Path, tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "packing-unfinished").write_bytes(mark)
    with pytest.raises(PackingError, match="something else began to write; choose another"):
        packing_of(photos, tmp_path)


def test_tars_of_others_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "train-00000.tar").write_bytes(b"precious")
    with pytest.raises(PackingError, match=r"holds train-00000\.tar; choose an empty directory"):
        packing_of(photos, tmp_path)
    (tmp_path / "train-00000.tar").unlink()
    packing_of(photos, tmp_path)
    (tmp_path / "other.tar").write_bytes(b"precious")
    with pytest.raises(PackingError, match=r"holds other\.tar; choose an empty directory"):
        packing_of(photos, tmp_path)


def test_a_packing_that_ended_between_manifest_and_mark_is_finished(
    photos: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    packing = packing_of(photos, tmp_path / "out")
    pack(packing)
    (tmp_path / "out" / "index.json").write_bytes(uninterrupted["index.json"])
    packing_of(photos, tmp_path / "out").finish()
    assert files_in(tmp_path / "out") == uninterrupted
    with pytest.raises(PackingError, match=r"index\.json exists; choose another directory"):
        packing_of(photos, tmp_path / "out")


def test_an_unfinished_set_is_not_read(photos: Path, tmp_path: Path) -> None:
    pack(packing_of(photos, tmp_path / "out"))
    with pytest.raises(Exception, match="packing ended before the data set was complete"):
        ensure_index(str(tmp_path / "out"), index_directory=str(tmp_path / "index"))


def test_a_set_in_memory_is_packed_in_this_process(
    photos: Path, uninterrupted: dict[str, bytes]
) -> None:
    report = pack_all(photos, "memory://bucket/packed", num_processes=4)
    assert report.index.num_samples == 40
    packed = fsspec.get_mapper("memory://bucket/packed")
    assert dict(packed) == uninterrupted


def test_directories_written_by_the_writer_are_refused(photos: Path, tmp_path: Path) -> None:
    write_set(tmp_path, num_samples=2, samples_per_shard=None)
    with pytest.raises(PackingError, match=r"index\.json exists; choose another directory"):
        packing_of(photos, tmp_path)


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "1/3/3", "a/b"])
def test_a_part_is_one_of_a_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"--part is .*; allowed: i/n with i from 1 to n"):
        Part.parse(text)


@pytest.mark.parametrize(
    ("names", "in_order"),
    [
        (["1", "10", "2", "007"], ["1", "2", "007", "10"]),
        (["1", "10", "2", "x"], ["1", "10", "2", "x"]),
        (["-1", "-10", "-2"], ["-1", "-10", "-2"]),
        ([], []),
    ],
)
def test_numbers_come_in_their_order(names: list[str], in_order: list[str]) -> None:
    images = [ImageFile(name, (name,), Path(name)) for name in names]
    assert label_names(images) == in_order


@pytest.mark.parametrize("output", ["photos", "photos/cat", ".", "link"])
def test_shards_are_not_written_where_the_source_lies(tmp_path: Path, output: str) -> None:
    path = tmp_path / "photos" / "cat" / "0.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(encode(picture(0)))
    (tmp_path / "link").symlink_to("photos")
    with pytest.raises(PackingError, match=r"images to be packed lie in .*cat; choose another"):
        packing_of(tmp_path / "photos", tmp_path / output)


def test_shards_may_be_written_below_the_source(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    pack_all(photos, photos / "shards")
    assert (photos / "shards" / "index.json").exists()


def test_the_records_are_small(photos: Path, tmp_path: Path) -> None:
    pack(packing_of(photos, tmp_path / "out"), part=Part(1, 8))
    record = json.loads((tmp_path / "out" / "packing-records" / "train-00000.json").read_text())
    assert record["shard"]["entry"]["shard"] == "train-00000.tar"
    assert sum(record["label_counts"].values()) == 5
