"""Images to be packed: a folder per class, a tar of that, or a table of paths and labels."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from datapipe.errors import PackingError

IMAGE_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
ILSVRC_NAME = re.compile(r"(n\d{8})_.*")
"""The ILSVRC archives name their files by class: n01440764_18.JPEG."""


@dataclass(frozen=True)
class ImageFile:
    """An image that is still to be read, and the labels it was found with."""

    name: str
    labels: tuple[str, ...]
    path: Path
    offset: int = 0
    size: int = -1
    """Bytes; -1 is up to the file's end."""

    @property
    def extension(self) -> str:
        return IMAGE_EXTENSIONS.get(PurePosixPath(self.name).suffix.lower(), "jpg")

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_images(source: Path) -> list[ImageFile]:
    """The images of a source, sorted by name. `PackingError` if there are none or it is none."""
    if source.is_dir():
        images = list(_in_folder(source))
        expected = "<class>/<image>.jpg (or .jpeg, .png, .webp)"
    elif not source.exists():
        raise PackingError(f"{source}: there is no such folder or file")
    elif source.suffix in (".parquet", ".csv"):
        images = list(_in_table(source))
        expected = "one row an image"
    else:
        images = list(_in_tar(source))
        expected = "members <class>/<image>.jpg (or .jpeg, .png, .webp)"
    if not images:
        raise PackingError(f"{source}: holds no images; expected: {expected}")
    return sorted(images, key=lambda image: image.name)


def _in_folder(folder: Path) -> Iterator[ImageFile]:
    for path in folder.rglob("*"):
        if _is_image(path) and path.is_file():
            name = path.relative_to(folder).as_posix()
            yield ImageFile(name, (_class_of(folder, name),), path)


def _in_tar(source: Path) -> Iterator[ImageFile]:
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isreg() and _is_image(name):
                    label = _class_of(source, str(name))
                    yield ImageFile(str(name), (label,), source, member.offset_data, member.size)
    except tarfile.TarError as error:
        raise PackingError(
            f"{source}: {error}; allowed: a folder, a .parquet or .csv table, a tar that is "
            "complete and not compressed"
        ) from error


def _is_image(path: PurePosixPath | Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _class_of(source: Path, name: str) -> str:
    """The folder that an image lies in, or else the class in its name if it has ILSVRC's form."""
    path = PurePosixPath(name)
    if path.parent.name:
        return path.parent.name
    match = ILSVRC_NAME.fullmatch(path.name)
    if match is None:
        raise PackingError(f"{source}: {name} lies in no class folder; expected <class>/{name}")
    return match[1]


def _in_table(source: Path) -> Iterator[ImageFile]:
    try:
        rows = _rows(source)
    except (pa.ArrowException, UnicodeError) as error:
        raise PackingError(f"{source}: cannot be read: {error}") from error
    for number, (path, labels) in enumerate(rows):
        if not path:
            raise PackingError(f"{source}: row {number} has no path")
        yield ImageFile(str(path), _labels_of(labels), source.parent / str(path))


def _rows(source: Path) -> list[tuple[Any, Any]]:
    """Path and labels of every row."""
    table = _read_table(source)
    if any(table.column_names.count(name) != 1 for name in ("path", "labels")):
        columns = ", ".join(table.column_names)
        raise PackingError(f"{source}: columns are {columns}; needed: path and labels, once each")
    return list(zip(table["path"].to_pylist(), table["labels"].to_pylist(), strict=True))


def _read_table(source: Path) -> Any:
    if source.suffix == ".parquet":
        return pq.read_table(source)
    types = {"path": pa.string(), "labels": pa.string()}
    options = pyarrow.csv.ConvertOptions(column_types=types)
    return pyarrow.csv.read_csv(source, convert_options=options)


def _labels_of(value: Any) -> tuple[str, ...]:
    """One label, a list of them, or a string of them separated by spaces or ';'."""
    if isinstance(value, str):
        value = re.split(r"[;\s]+", value)
    elif value is None or not isinstance(value, Iterable):
        value = [value]
    return tuple(str(label) for label in value if label not in (None, ""))
