"""ShardTable: what the index knows of one shard's samples, and its Parquet form.

Columns: key string; offset, size int64 (of the image's bytes in the tar); width, height int32 (0 is
unknown); labels list<int64> (null where the shard holds no usable label); crc32 uint32 (of the
image, null where nobody read all of it); name string (of the file that was packed, null where it is
not known). Readers ignore any other column. The file's metadata may hold `TableFacts`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datapipe.errors import BadIndex, UnreadableUrl
from datapipe.json_text import parse_json
from datapipe.storage import read_bytes, write_bytes

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("labels", pa.list_(pa.int64())),
        ("crc32", pa.uint32()),
        ("name", pa.string()),
    ]
)
NEVER_NULL = ("key", "offset", "size", "width", "height")
LARGEST_LABEL = 9_999_999
"""Of a label id: what is counted and weighed by id takes memory for every id up to the largest."""
FACTS_KEY = b"datapipe"


class SampleEntry(NamedTuple):
    """One row: where a sample's image is, and what is known of it."""

    key: str
    offset: int
    size: int
    width: int
    height: int
    labels: tuple[int, ...] | None
    crc32: int | None
    name: str | None


@dataclass(frozen=True)
class TableFacts:
    """What a table was made of: whoever finds the shard unchanged need not make it again."""

    shard: str
    """The name of the shard's file; its URL, where it does not lie beside the table."""
    shard_bytes: int
    num_samples: int
    num_labels: int
    """The largest label id + 1."""
    has_crc32: bool
    """Of every sample."""
    digest: str

    @staticmethod
    def of(entries: Sequence[SampleEntry], *, shard: str, shard_bytes: int) -> TableFacts:
        return TableFacts(
            shard=shard,
            shard_bytes=shard_bytes,
            num_samples=len(entries),
            num_labels=max([-1, *(max(entry.labels) for entry in entries if entry.labels)]) + 1,
            has_crc32=all(entry.crc32 is not None for entry in entries),
            digest=digest_of(entries),
        )


@dataclass(frozen=True, eq=False)
class ShardTable:
    """A shard's rows as columns; row i has label_ids[label_offsets[i]:label_offsets[i + 1]].

    Text is decoded for the rows that are asked for.
    """

    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    label_ids: NDArray[np.int64]
    label_offsets: NDArray[np.int64]
    has_labels: NDArray[np.bool_]
    crc32: NDArray[np.uint32]
    """0 where it is not known."""
    has_crc32: NDArray[np.bool_]
    key_column: Any
    """A pyarrow array of strings, as the next one."""
    name_column: Any

    @property
    def num_samples(self) -> int:
        return len(self.offsets)

    def key(self, row: int) -> str:
        return str(self.key_column[row])

    def name(self, row: int) -> str | None:
        name: str | None = self.name_column[row].as_py()
        return name

    def labels(self, row: int) -> NDArray[np.int64] | None:
        """The label ids of a row, None where there is no usable label."""
        if not self.has_labels[row]:
            return None
        ids: NDArray[np.int64] = self.label_ids[
            self.label_offsets[row] : self.label_offsets[row + 1]
        ]
        return ids

    def known_crc32(self, row: int) -> int | None:
        return int(self.crc32[row]) if self.has_crc32[row] else None

    @cached_property
    def keys(self) -> list[str]:
        keys: list[str] = self.key_column.to_pylist()
        return keys

    @cached_property
    def names(self) -> list[str | None]:
        names: list[str | None] = self.name_column.to_pylist()
        return names


def write_table(
    url: str, entries: Sequence[SampleEntry], *, facts: TableFacts | None = None
) -> None:
    columns = list(zip(*entries, strict=True)) or [()] * len(SCHEMA)
    arrays = [
        pa.array(column, type=field.type) for column, field in zip(columns, SCHEMA, strict=True)
    ]
    schema = SCHEMA
    if facts is not None:
        schema = SCHEMA.with_metadata({FACTS_KEY: json.dumps(asdict(facts))})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    write_bytes(url, sink.getvalue().to_pybytes())


def read_table(url: str) -> ShardTable:
    """Errors: `BadIndex` for a file that is missing, no table, or without these columns;
    `UnreadableUrl`.
    """
    try:
        table = _open(url).read(columns=SCHEMA.names, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise BadIndex(url, f"cannot be read: {error}") from error
    found = {field.name: field.type for field in table.schema}
    missing = [field for field in SCHEMA if found.get(field.name) != field.type]
    if missing:
        listed = ", ".join(f"{field.name} ({field.type})" for field in missing)
        raise BadIndex(url, f"there is no column {listed}")
    holes = [name for name in NEVER_NULL if table.column(name).null_count]
    if holes:
        raise BadIndex(url, f"column {holes[0]} has rows without a value")
    columns = _columns(table.combine_chunks())
    if table.num_rows and min(columns.offsets.min(), columns.sizes.min()) < 0:
        raise BadIndex(url, "an offset or a size is negative")
    return columns


def read_facts(url: str) -> TableFacts | None:
    """What the table says that it was made of; None if it does not, or cannot be read."""
    try:
        metadata = _open(url).schema_arrow.metadata or {}
        return TableFacts(**parse_json(metadata[FACTS_KEY]))
    except (OSError, pa.ArrowException, UnreadableUrl, ValueError, TypeError, KeyError):
        return None


def digest_of(entries: Sequence[SampleEntry]) -> str:
    """SHA-256 (hex) of the samples, their order and labels; not of where the images lie."""
    samples = [[entry.key, entry.size, entry.crc32, entry.labels] for entry in entries]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def crc32_of(payload: bytes | memoryview) -> int:
    return zlib.crc32(payload)


def _open(url: str) -> Any:
    return pq.ParquetFile(pa.BufferReader(read_bytes(url)), pre_buffer=False)


def _columns(table: Any) -> ShardTable:
    labels = table.column("labels").combine_chunks()
    lengths = labels.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    crc32 = table.column("crc32").combine_chunks()
    return ShardTable(
        offsets=table.column("offset").to_numpy(),
        sizes=table.column("size").to_numpy(),
        widths=table.column("width").to_numpy(),
        heights=table.column("height").to_numpy(),
        label_ids=labels.flatten().to_numpy(zero_copy_only=False),
        label_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        has_labels=labels.is_valid().to_numpy(zero_copy_only=False),
        crc32=crc32.fill_null(0).to_numpy(zero_copy_only=False),
        has_crc32=crc32.is_valid().to_numpy(zero_copy_only=False),
        key_column=table.column("key").combine_chunks(),
        name_column=table.column("name").combine_chunks(),
    )
