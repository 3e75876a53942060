"""Images to be packed: a folder per class, a tar of that, or a table of paths and labels."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from datapipe.errors import PackingError
from datapipe.tar_walk import members, open_tar

IMAGE_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
TABLE_EXTENSIONS = (".parquet", ".csv")
ILSVRC_NAME = re.compile(r"(n\d{8})_.*")
"""The ILSVRC archives name their files by class: n01440764_18.JPEG."""


LabelsOf = Callable[[str], tuple[str, ...]]
"""From an image's name in its source to its labels."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that is still to be read, and the labels it was found with."""

    name: str
    labels: tuple[str, ...]
    path: Path
    offset: int = 0
    size: int = -1
    """Bytes; -1 is up to the file's end."""

    @property
    def short_name(self) -> str:
        """The file's name within its folder's: cat/17.jpg, wherever the folder lies."""
        return "/".join([part for part in self.name.split("/") if part not in ("", ".")][-2:])

    @property
    def extension(self) -> str:
        return IMAGE_EXTENSIONS.get(PurePosixPath(self.name).suffix.lower(), "jpg")

    def num_bytes(self) -> int:
        """0 where there is no such file: reading it will tell."""
        if self.size >= 0:
            return self.size
        try:
            return self.path.stat().st_size
        except OSError:
            return 0

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class Listing:
    """What a source holds."""

    images: list[ImageFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """Other files, by kind: '.bmp', '.txt', ...; those that are hidden are not counted."""

    def left_out_text(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.left_out.most_common())


def list_images(source: Path) -> Listing:
    """The images of a source, sorted by name. `PackingError` if there are none or it is none."""
    if source.suffix.lower() in TABLE_EXTENSIONS and source.is_file():
        listing = Listing(list(_in_table(source)))
        return _sorted(source, listing, expected="one row an image")
    expected = "<class>/<image>.jpg (or .jpeg, .png, .webp)"
    return list_files(source, lambda name: (_class_of(source, name),), expected=expected)


def list_files(source: Path, labels_of: LabelsOf, *, expected: str) -> Listing:
    """The images of a folder or a tar, sorted by name; errors as above."""
    if source.is_dir():
        return _sorted(source, _in_folder(source, labels_of), expected=expected)
    if not source.exists():
        raise PackingError(f"{source}: there is no such folder or file")
    return _sorted(source, _in_tar(source, labels_of), expected=f"members {expected}")


def _sorted(source: Path, listing: Listing, *, expected: str) -> Listing:
    if not listing.images:
        met = f"; it holds {listing.left_out_text()}" if listing.left_out else ""
        raise PackingError(f"{source}: holds no images{met}; expected: {expected}")
    listing.images.sort(key=lambda image: image.name)
    return listing


def _in_folder(folder: Path, labels_of: LabelsOf) -> Listing:
    listing = Listing()
    for path in _files_below(folder, frozenset()):
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        if is_image(path):
            listing.images.append(ImageFile(name, labels_of(name), path))
        else:
            listing.left_out[kind_of(path)] += 1
    return listing


def _files_below(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The files that are not hidden; symbolic links are followed, but not to a folder above them.

    above: the real paths of the folders that `folder` was reached through.
    """
    real_path = os.path.realpath(folder)
    if real_path in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files_below(folder / entry.name, above | {real_path})
            elif entry.is_file() or entry.is_symlink():
                yield folder / entry.name


def _in_tar(source: Path, labels_of: LabelsOf) -> Listing:
    """Of members with one name the last one counts, as when a tar is extracted."""
    listing = Listing()
    images: dict[str, ImageFile] = {}
    for path, place in _files_in_tar(source):
        if any(part.startswith(".") and part != ".." for part in path.parts):
            continue
        if place is None:
            listing.left_out["links"] += 1
        elif is_image(path):
            images[str(path)] = ImageFile(str(path), labels_of(str(path)), source, *place)
        else:
            listing.left_out[kind_of(path)] += 1
    listing.images.extend(images.values())
    return listing


def _files_in_tar(source: Path) -> Iterator[tuple[PurePosixPath, tuple[int, int] | None]]:
    """Every file with the offset and size of its bytes, which a hard link shares with another one.

    None for symbolic links, and hard links to what is no file of this tar.
    """
    places: dict[str, tuple[int, int]] = {}
    try:
        with source.open("rb") as file, open_tar(file) as tar:
            for member in members(tar):
                path, place = PurePosixPath(member.name), None
                if member.isreg():
                    place = (member.offset_data, member.size)
                elif member.islnk():
                    place = places.get(str(PurePosixPath(member.linkname)))
                elif not member.issym():
                    continue
                if place is not None:
                    places[str(path)] = place
                yield path, place
    except tarfile.TarError as error:
        raise PackingError(
            f"{source}: {error}; allowed: a folder, a .parquet or .csv table, a tar that is "
            "complete and not compressed"
        ) from error


def is_image(path: PurePath) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS


def kind_of(path: PurePath) -> str:
    return path.suffix.lower() or "without extension"


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
    except (OSError, pa.ArrowException, UnicodeError) as error:
        raise PackingError(f"{source}: cannot be read: {error}") from error
    rows_of_path: dict[Path, str] = {}
    for number, (name, labels) in enumerate(rows, start=1):
        row = f"row {number + 1} of the file" if _is_csv(source) else f"record {number}"
        if not name:
            raise PackingError(f"{source}: {row} has no path")
        path = source.parent / str(name)
        if path in rows_of_path:
            raise PackingError(
                f"{source}: {name} is in {rows_of_path[path]} and again in {row}; put all labels "
                "of an image into one row"
            )
        rows_of_path[path] = row
        yield ImageFile(str(name), _labels_of(labels), path)


def _is_csv(source: Path) -> bool:
    return source.suffix.lower() == ".csv"


def _rows(source: Path) -> list[tuple[Any, Any]]:
    """Path and labels of every row."""
    table = _read_table(source)
    if any(table.column_names.count(name) != 1 for name in ("path", "labels")):
        columns = ", ".join(table.column_names)
        raise PackingError(f"{source}: columns are {columns}; needed: path and labels, once each")
    return list(zip(table["path"].to_pylist(), table["labels"].to_pylist(), strict=True))


def _read_table(source: Path) -> Any:
    if not _is_csv(source):
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
