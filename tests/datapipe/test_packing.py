"""Packing: label maps, the order of label ids, and a directory that holds the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datapipe.errors import PackingError
from datapipe.packing import LabelMap, label_names, pack
from datapipe.sources import ImageFile
from tests.datapipe.small_sets import encode, picture


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"cat": ["a", "b"]}, ("a", "b")),
        ({"cat": [10, "9"]}, ("10", "9")),
        ({"labels_of_class": {"cat": [1]}}, ("1",)),
        ({"labels_of_class": {"cat": [1, "2"]}, "names": {"1": "x", "2": "y"}}, ("1 x", "2 y")),
    ],
)
def test_labels_of_a_map_are_text_or_numbers(
    tmp_path: Path, value: dict[str, Any], expected: tuple[str, ...]
) -> None:
    (tmp_path / "map.json").write_text(json.dumps(value))
    assert LabelMap.read(tmp_path / "map.json").labels_of_class == {"cat": expected}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"cat": [null]}', "None is neither text nor an integer"),
        ('{"cat": [true]}', "True is neither text nor an integer"),
        ('{"cat": [1.5]}', "1.5 is neither text nor an integer"),
        ('{"cat": [["a"]]}', "['a'] is neither text nor an integer"),
        ('{"cat": "abc"}', "the labels of a class are not a list"),
        ('{"labels_of_class": {"cat": [1]}, "names": {"1": ["x"]}}', "['x'] is neither text"),
        ('{"labels_of_class": {"cat": [1]}, "names": {"2": "x"}}', "KeyError"),
        ('{"labels_of_class": [1]}', "AttributeError"),
        ("[1, 2]", "AttributeError"),
        ("3", "TypeError"),
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
    ],
)
def test_any_other_label_map_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(PackingError, match="not a label map") as raised:
        LabelMap.read(tmp_path / "map.json")
    assert reason in str(raised.value)


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
        pack_one(path, tmp_path / output)


def test_shards_may_be_written_below_the_source(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(encode(picture(0)))
    pack_one(tmp_path / "0.jpg", tmp_path / "shards")
    assert (tmp_path / "shards" / "index.json").exists()


def pack_one(path: Path, output: Path) -> None:
    pack(
        [ImageFile(path.name, ("cat",), path)],
        directory=str(output),
        names=["cat"],
        known_labels=None,
        prefix="train",
        shard_bytes=1_000_000,
        skip_bad=False,
        on_image=lambda: None,
    )
