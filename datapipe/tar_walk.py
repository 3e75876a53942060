"""The samples of an existing WebDataset shard, found by walking its headers.

A sample is the members that share a name up to the first dot, wherever they lie in the tar: an
image (.jpg, .jpeg, .png, .webp) and its labels: .cls (one number) or .json ({"labels": [..]},
{"label": i} or {"cls": i}, beside them perhaps the "name" of the file that was packed). Other
members are ignored, nothing is unpickled, and names never become paths.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from datapipe.decode import DecodeError, image_size
from datapipe.errors import BadIndex, MissingShard, UnreadableShard
from datapipe.storage import opened
from datapipe.table import LARGEST_LABEL, SampleEntry, crc32_of

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
LARGEST_LABEL_MEMBER = 1 << 20
LARGEST_IMAGE_MEMBER = 1 << 28
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


@dataclass(frozen=True)
class _Image:
    """Where a sample's image lies and what it is; not its bytes, or a shard would be in memory."""

    offset: int
    size: int
    width: int
    height: int
    crc32: int


@dataclass
class _Found:
    """What was met of one sample so far."""

    image: _Image | None = None
    labels: tuple[int, ...] | None = None
    name: str | None = None

    def entries(self, key: str) -> Iterator[SampleEntry]:
        """The row of the index, if there is an image."""
        if self.image is not None:
            yield SampleEntry(key=key, labels=self.labels, name=self.name, **asdict(self.image))


def walk_shard(url: str) -> list[SampleEntry]:
    """The samples with an image, in the order in which their first member lies in the shard.

    A shard that ends early gives what it holds, with a warning; so does one with samples that have
    no usable label. Errors: `MissingShard`, `BadIndex` (two samples of one name), `UnreadableUrl`,
    `UnreadableShard` (not a tar).
    """
    try:
        with opened(url) as file:
            found = _walk(url, file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingShard((url,)) from error
    except tarfile.TarError as error:
        raise UnreadableShard(url, str(error)) from error
    entries = [entry for key, sample in found.items() for entry in sample.entries(key)]
    num_unlabelled = sum(entry.labels is None for entry in entries)
    if num_unlabelled:
        logger.warning("samples have no usable label shard=%s samples=%d", url, num_unlabelled)
    return entries


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """A tar that is not compressed. In names, bytes that are not UTF-8 become \\xNN."""
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, in order; `tarfile.ReadError` where it is damaged or cut.

    `TarFile` alone takes a damaged or missing header for the end of the archive.
    """
    while (member := tar.next()) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # or every header stays in memory
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"neither a header nor the end of a tar at byte {tar.offset}")


def _walk(url: str, file: IO[bytes]) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    with open_tar(file) as tar:
        try:
            for member in members(tar):
                payload = _payload(tar, member)
                if payload is not None:
                    _add(url, found, member, payload)
        except tarfile.ReadError as error:
            logger.warning("shard ends early shard=%s samples=%d reason=%s", url, len(found), error)
    return found


def _payload(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The bytes of an image or label member, None for anything else."""
    _, extension = _split(member.name)
    limit = LARGEST_IMAGE_MEMBER if extension in IMAGE_EXTENSIONS else LARGEST_LABEL_MEMBER
    wanted = extension in IMAGE_EXTENSIONS or extension in LABEL_EXTENSIONS
    if not (wanted and member.isreg() and member.size <= limit):
        return None
    file = tar.extractfile(member)
    assert file is not None
    payload = file.read()
    if len(payload) < member.size:
        raise tarfile.ReadError(f"{member.name} is cut short")
    return payload


def _add(url: str, found: dict[str, _Found], member: tarfile.TarInfo, payload: bytes) -> None:
    key, extension = _split(member.name)
    sample = found.setdefault(key, _Found())
    if extension in LABEL_EXTENSIONS:
        value = _parsed(payload)
        labels = _labels(extension, value)
        sample.labels = sample.labels if labels is None else labels
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            sample.name = _encodable(value["name"])
    elif sample.image is not None:
        raise BadIndex(url, f"two images have the name {key!r}; repack the shard")
    else:
        sample.image = _image(member, payload)


def _image(member: tarfile.TarInfo, payload: bytes) -> _Image:
    try:
        width, height = image_size(payload)
    except DecodeError:
        width, height = 0, 0
    return _Image(member.offset_data, member.size, width, height, crc32_of(payload))


def _split(name: str) -> tuple[str, str]:
    match = MEMBER_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _parsed(payload: bytes) -> Any:
    """The JSON in a member, None where there is none."""
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None


def _encodable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _labels(extension: str, value: Any) -> tuple[int, ...] | None:
    """The label ids in a member's JSON, None where it does not hold any that can be used."""
    if isinstance(value, dict) and extension == "json":
        value = value.get("labels", value.get("label", value.get("cls")))
    labels = value if isinstance(value, list) else [value]
    usable = all(type(label) is int and 0 <= label <= LARGEST_LABEL for label in labels)
    return tuple(dict.fromkeys(labels)) if usable else None
