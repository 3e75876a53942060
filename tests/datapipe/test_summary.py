"""info: what it counts."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.index import ShardIndex, index_shards
from datapipe.labels import Label, write_labels
from datapipe.summary import (
    Distribution,
    label_names,
    share_with_restart_markers,
    summarize,
    summary_lines,
)
from tests.datapipe.small_sets import encode, picture, write_tar


@given(st.lists(st.lists(st.integers(0, 1 << 40), max_size=20), max_size=4))
def test_the_spread_is_numpys_up_to_the_medians_precision(parts: list[list[int]]) -> None:
    spread = Distribution()
    for part in parts:
        spread.add(np.array(part, np.int64))
    values = sorted(value for part in parts for value in part)
    if not values:
        assert (spread.smallest, spread.median(), spread.largest) == (0, 0, 0)
        return
    assert (spread.smallest, spread.largest) == (values[0], values[-1])
    assert spread.median() == pytest.approx(values[(len(values) - 1) // 2], rel=1 / 2000, abs=1)


def mixed_set(directory: Path) -> ShardIndex:
    """Four images: one with restart markers, one without a label, one that is none."""
    with_markers = BytesIO()
    picture(1, width=64, height=50).save(with_markers, "JPEG", restart_marker_blocks=2)
    members = {
        "0.jpg": with_markers.getvalue(),
        "0.cls": b"2",
        "1.jpg": encode(picture(1)),
        "1.json": b'{"labels": [0, 2]}',
        "2.png": encode(picture(2), "PNG"),
        "3.jpg": b"no image",
        "3.cls": b"2",
    }
    write_tar(directory / "a.tar", members)
    names = ["cat", "<script>alert(1)</script>", "red\x1b[31m\u202edog"]
    labels = [Label(number, name, 0.5) for number, name in enumerate(names)]
    write_labels(str(directory / "labels.json"), labels)
    return index_shards([str(directory / "a.tar")], directory_url=str(directory))


def test_everything_is_counted_and_names_do_no_harm(tmp_path: Path) -> None:
    index = mixed_set(tmp_path)
    tables_read = []
    summary = summarize(index, on_table=lambda: tables_read.append(1))
    lines = list(summary_lines(index, summary, label_names(index)))
    assert tables_read == [1]
    text = "\n".join(lines)
    assert text.isascii()
    assert "\x1b" not in text
    sizes = sorted(index.table(0).sizes.tolist())
    counted = dict(line.strip().split("  ", 1) for line in lines[1:10])
    assert {name: text.strip() for name, text in counted.items() if name != "size"} == {
        "shards": "1",
        "samples": "4",
        "labels": "3",
        "image bytes": f"{sizes[0]:,} to {sizes[3]:,}, median {sizes[1]:,}",
        "pixels": "480 to 3,200, median 480",
        "no label": "1 (25.0%)",
        "no size": "1 (25.0%)",
        "no crc32": "4 (100.0%)",
    }
    assert lines[11].split() == ["2", "3", "(75.0%)", "#" * 20, "red\\x1b[31m\\u202edog"]
    assert lines[12].split() == ["0", "1", "(25.0%)", "#" * 7, "cat"]
    assert len(lines) == 13


def test_restart_markers_are_looked_for_in_some_images(tmp_path: Path) -> None:
    assert share_with_restart_markers(mixed_set(tmp_path), seed=0) == (1, 4)


def test_labels_that_cannot_be_read_have_no_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = mixed_set(tmp_path)
    (tmp_path / "labels.json").write_text("[1]")
    assert label_names(index) == {}
    assert "labels are shown without names" in caplog.text
    (tmp_path / "labels.json").unlink()
    assert label_names(index) == {}
