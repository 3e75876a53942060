"""ShardTable: what the index knows of one shard's samples, and its Parquet form.

Columns: key string; offset, size int64 (of the image's bytes in the tar); width, height int32 (0 is
unknown); labels list<int64> (null where the shard holds no usable label); crc32 uint32 (of the
image); name string (of the file that was packed, null where it is not known). Readers ignore any
other column.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from datapipe.errors import BadIndex
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
LARGEST_LABEL = 9_999_999
"""Of a label id: what is counted and weighed by id takes memory for every id up to the largest."""


@dataclass(frozen=True)
class SampleEntry:
    """One row: where a sample's image is, and what is known of it."""

    key: str
    offset: int
    size: int
    width: int
    height: int
    labels: tuple[int, ...] | None
    crc32: int
    name: str | None


@dataclass(frozen=True, eq=False)
class ShardTable:
    """A shard's rows as columns; row i has label_ids[label_offsets[i]:label_offsets[i + 1]]."""

    keys: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]
    label_ids: NDArray[np.int64]
    label_offsets: NDArray[np.int64]
    has_labels: NDArray[np.bool_]
    crc32: NDArray[np.uint32]
    names: list[str | None]

    @property
    def num_samples(self) -> int:
        return len(self.keys)


def write_table(url: str, entries: Sequence[SampleEntry]) -> None:
    columns = [
        pa.array([getattr(entry, field.name) for entry in entries], type=field.type)
        for field in SCHEMA
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), sink, compression="zstd")
    write_bytes(url, sink.getvalue().to_pybytes())


def read_table(url: str) -> ShardTable:
    """Errors: `BadIndex` for a file that is missing, no table, or without these columns;
    `UnreadableUrl`.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(url)))
        table = file.read(columns=SCHEMA.names)
    except (OSError, pa.ArrowException) as error:
        raise BadIndex(url, f"cannot be read: {error}") from error
    found = {field.name: field.type for field in table.schema}
    missing = [field for field in SCHEMA if found.get(field.name) != field.type]
    if missing:
        columns = ", ".join(f"{field.name} ({field.type})" for field in missing)
        raise BadIndex(url, f"there is no column {columns}")
    return _columns(table.combine_chunks())


def digest_of(entries: Sequence[SampleEntry]) -> str:
    """SHA-256 (hex) of the samples, their order and labels; not of where the images lie."""
    samples = [[entry.key, entry.size, entry.crc32, entry.labels] for entry in entries]
    return hashlib.sha256(json.dumps(samples).encode()).hexdigest()


def crc32_of(payload: bytes | memoryview) -> int:
    return zlib.crc32(payload)


def _columns(table: Any) -> ShardTable:
    labels = table.column("labels")
    lengths = labels.combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return ShardTable(
        keys=table.column("key").to_pylist(),
        offsets=table.column("offset").to_numpy(),
        sizes=table.column("size").to_numpy(),
        widths=table.column("width").to_numpy(),
        heights=table.column("height").to_numpy(),
        label_ids=labels.combine_chunks().flatten().to_numpy(zero_copy_only=False),
        label_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        has_labels=labels.is_valid().to_numpy(),
        crc32=table.column("crc32").to_numpy(),
        names=table.column("name").to_pylist(),
    )
