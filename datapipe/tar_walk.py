"""The samples of an existing WebDataset shard, found by walking its headers.

A sample is the members that share a name up to the first dot, wherever they lie in the tar: an
image (.jpg, .jpeg, .png, .webp) and its labels: .cls (one number) or .json ({"labels": [..]},
{"label": i} or {"cls": i}). Other members are ignored, nothing is unpickled, and names never become
paths.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO

from datapipe.decode import DecodeError, image_size
from datapipe.errors import BadIndex, MissingShard, UnreadableShard
from datapipe.storage import open_filesystem
from datapipe.table import SampleEntry, crc32_of

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

    def entries(self, key: str) -> Iterator[SampleEntry]:
        """The row of the index, if there is an image."""
        if self.image is not None:
            yield SampleEntry(key=key, labels=self.labels, **asdict(self.image))


def walk_shard(url: str) -> list[SampleEntry]:
    """The samples with an image, in the order in which their first member lies in the shard.

    A shard that ends early gives what it holds, with a warning. Errors: `MissingShard`, `BadIndex`
    (two samples of one name), `UnreadableShard` (not a tar).
    """
    filesystem, path = open_filesystem(url)
    try:
        with filesystem.open(path, "rb") as file:
            found = _walk(url, file)
    except FileNotFoundError as error:
        raise MissingShard((url,)) from error
    except (OSError, tarfile.TarError) as error:
        raise UnreadableShard(url, str(error)) from error
    return [entry for key, sample in found.items() for entry in sample.entries(key)]


def _walk(url: str, file: IO[bytes]) -> dict[str, _Found]:
    found: dict[str, _Found] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while True:
            try:
                member = tar.next()
                if member is None:
                    return found
                payload = _payload(tar, member)
            except tarfile.ReadError as error:
                logger.warning(
                    "shard ends early shard=%s samples=%d reason=%s", url, len(found), error
                )
                return found
            if payload is not None:
                _add(url, found, member, payload)
            tar.members.clear()  # type: ignore[attr-defined]  # or every header stays in memory


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
        labels = _labels(extension, payload)
        sample.labels = sample.labels if labels is None else labels
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


def _labels(extension: str, payload: bytes) -> tuple[int, ...] | None:
    """The label ids in a member, None where it does not hold any that can be used."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict) and extension == "json":
        value = value.get("labels", value.get("label", value.get("cls")))
    labels = value if isinstance(value, list) else [value]
    usable = all(type(label) is int and 0 <= label < 1 << 63 for label in labels)
    return tuple(dict.fromkeys(labels)) if usable else None
