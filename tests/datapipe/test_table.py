"""Tables and manifests: what is written is read, and what would harm is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import BadIndex
from datapipe.index import ShardIndex, write_manifest
from datapipe.manifest import ShardEntry
from datapipe.table import (
    LARGEST_LABEL,
    SCHEMA,
    SampleEntry,
    ShardTable,
    TableFacts,
    digest_of,
    read_facts,
    read_table,
    write_table,
)
from tests.datapipe.small_sets import read_all, write_set

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
entries = st.builds(
    SampleEntry,
    key=texts,
    offset=st.integers(0, 1 << 62),
    size=st.integers(0, 1 << 40),
    width=st.integers(0, 1 << 30),
    height=st.integers(0, 1 << 30),
    labels=st.none() | st.lists(st.integers(0, LARGEST_LABEL), max_size=3).map(tuple),
    crc32=st.none() | st.integers(0, (1 << 32) - 1),
    name=st.none() | texts,
)


def rows(table: ShardTable) -> list[SampleEntry]:
    return [
        SampleEntry(
            key=table.key(row),
            offset=int(table.offsets[row]),
            size=int(table.sizes[row]),
            width=int(table.widths[row]),
            height=int(table.heights[row]),
            labels=None if (ids := table.labels(row)) is None else tuple(ids.tolist()),
            crc32=table.known_crc32(row),
            name=table.name(row),
        )
        for row in range(table.num_samples)
    ]


@given(written=st.lists(entries, max_size=6))
def test_a_table_says_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[SampleEntry]
) -> None:
    url = str(tmp_path_factory.getbasetemp() / "round-trip.parquet")
    facts = TableFacts.of(written, shard="a.tar", shard_bytes=5)
    write_table(url, written, facts=facts)
    table = read_table(url)
    assert rows(table) == written
    assert table.keys == [entry.key for entry in written]
    assert table.names == [entry.name for entry in written]
    assert read_facts(url) == facts


def test_a_table_may_be_written_without_facts(tmp_path: Path) -> None:
    write_table(f"{tmp_path}/a.parquet", [])
    assert read_facts(f"{tmp_path}/a.parquet") is None
    assert read_facts(f"{tmp_path}/nowhere.parquet") is None


def test_an_unknown_crc32_is_not_checked_and_a_known_one_is(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=2, samples_per_shard=None)
    first, second = rows(index.table(0))
    write_table(index.table_url(0), [first._replace(crc32=None), second._replace(crc32=7)])
    samples = read_all(ShardIndex.open(str(tmp_path)))
    assert samples[0].problem() is None
    assert samples[1].problem() == "its bytes are not those that were indexed (crc32 differs)"


def test_the_digest_tells_known_crc32_apart() -> None:
    entry = SampleEntry("a", 0, 1, 2, 3, (4,), 5, None)
    others = [entry._replace(crc32=None), entry._replace(crc32=6), entry._replace(labels=None)]
    assert len({digest_of([other]) for other in [entry, *others]}) == 4
    assert digest_of([entry]) == digest_of([entry._replace(offset=512, width=0, name="n")])


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("offset", [None, 1], "column offset has rows without a value"),
        ("size", [-1, 1], "an offset or a size is negative"),
        ("labels", [[3], [1 << 40]], "labels 3 to 1099511627776, the manifest says 9 labels"),
        ("labels", [[-1], []], "labels -1 to -1, the manifest says 9 labels"),
    ],
    ids=["hole", "negative", "label of another set", "negative label"],
)
def test_values_that_would_harm_are_refused(
    tmp_path: Path, column: str, values: list[object], reason: str
) -> None:
    index = write_set(tmp_path, num_samples=2, samples_per_shard=None)
    table = pq.read_table(index.table_url(0))
    place = SCHEMA.names.index(column)
    field = SCHEMA.field(column)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), index.table_url(0))
    with pytest.raises(BadIndex, match=reason):
        index.table(0)


def test_a_manifest_of_many_shards_is_read_as_columns(tmp_path: Path) -> None:
    shards = [
        ShardEntry(f"{number}.tar", f"{number}.parquet", number, 10 * number, f"{number:064x}")
        for number in range(1000)
    ]
    write_manifest(ShardIndex(str(tmp_path), shards, num_labels=3))
    index = ShardIndex.open(str(tmp_path))
    assert list(index.shards) == shards
    assert index.shards[-1] == shards[-1]
    assert index.shards[3:5] == shards[3:5]
    assert index.num_samples == 999 * 500
    assert index.locate(np.array([3]))[0].tolist() == [3]


@pytest.mark.parametrize(
    "change", [{"bytes": -1}, {"num_samples": True}, {"digest": None}, {"shard": ["a"]}]
)
def test_a_line_of_other_types_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_set(tmp_path, num_samples=1, samples_per_shard=None)
    manifest = json.loads((tmp_path / "index.json").read_text())
    manifest["shards"][0] |= change
    (tmp_path / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(BadIndex, match="malformed"):
        ShardIndex.open(str(tmp_path))
