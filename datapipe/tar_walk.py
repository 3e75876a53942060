"""The image and label members of a shard, by the headers of its tar.

A plain local shard is walked by compiled code (`datapipe.native_walk`), any other one by tarfile,
whose reading of the headers counts. Nothing is extracted or unpickled, and names never become
paths.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from datapipe.decode import DecodeError, image_size
from datapipe.image_header import header_size
from datapipe.native_walk import OddArchive, Piece, native_pieces
from datapipe.table import crc32_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
LARGEST_LABEL_MEMBER = 1 << 20
LARGEST_IMAGE_MEMBER = 1 << 28
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
MALFORMED = (ValueError, OverflowError, LookupError, RecursionError)
"""What tarfile raises for headers that were made to harm, besides errors of its own."""


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """A tar that is not compressed. In names, bytes that are not UTF-8 become \\xNN."""
    bounded: Any = _BoundedReads(file)
    return tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="backslashreplace")


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, in order; `tarfile.ReadError` where it is damaged or cut.

    `TarFile` alone takes a damaged or missing header for the end of the archive.
    """
    while (member := _next(tar)) is not None:
        yield member
        tar.members.clear()  # type: ignore[attr-defined]  # or every header stays in memory
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"neither a header nor the end of a tar at byte {tar.offset}")


def fast_pieces(path: str | os.PathLike[str], *, with_crc32: bool) -> Iterator[Piece]:
    """The pieces of a plain local tar. `OddArchive` for any other, perhaps after some of them."""
    with open(path, "rb", buffering=0) as file:
        number = file.fileno()
        for pieces in native_pieces(number, os.fstat(number).st_size):
            if with_crc32 or any(piece[3] < 0 for piece in pieces):
                yield from (_with_payload(number, piece, with_crc32) for piece in pieces)
            else:
                yield from pieces


def tar_pieces(tar: tarfile.TarFile, file_size: int, *, with_crc32: bool) -> Iterator[Piece]:
    """The pieces of any tar, one a member. `tarfile.ReadError` where it is damaged or cut."""
    for member in members(tar):
        key, extension = _split(member.name)
        is_image = extension in IMAGE_EXTENSIONS
        if not (is_image or extension in LABEL_EXTENSIONS) or not is_one_piece(member):
            continue
        offset, size = member.offset_data, member.size
        if offset + size > file_size:
            raise tarfile.ReadError(f"{member.name} is cut short")
        if size > (LARGEST_IMAGE_MEMBER if is_image else LARGEST_LABEL_MEMBER):
            yield key, -1, 0, 0, 0, None, extension, None
        elif is_image:
            measured = _measured(tar, member, with_crc32=with_crc32)
            yield key, offset, size, *measured, "", None
        else:
            yield key, -1, 0, 0, 0, None, extension, read_at(tar, offset, size)


def decoded_size(payload: bytes) -> tuple[int, int]:
    """(width, height) by a decoder; (0, 0) where it finds no image."""
    try:
        return image_size(payload)
    except DecodeError:
        return 0, 0


class _BoundedReads:
    """A file that gives no header its gigabytes: tarfile asks for whatever a header claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= LARGEST_IMAGE_MEMBER:
            raise tarfile.ReadError(f"a header claims {count:,} bytes")
        return self._file.read(count)


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except MALFORMED as error:
        raise tarfile.ReadError(f"malformed header: {error}") from error


def is_one_piece(member: tarfile.TarInfo) -> bool:
    """Whether its bytes lie together in the archive: no link, and no file with holes."""
    return member.isreg() and not member.issparse() and member.size >= 0


def _measured(
    tar: tarfile.TarFile, member: tarfile.TarInfo, *, with_crc32: bool
) -> tuple[int, int, int | None]:
    """Width, height and crc32 of an image."""
    start, size = member.offset_data, member.size
    if with_crc32:
        payload = read_at(tar, start, size)
        found = header_size(lambda place, count: payload[place : place + count])
        return *(found or decoded_size(payload)), crc32_of(payload)
    found = header_size(
        lambda place, count: read_at(tar, start + place, max(0, min(count, size - place)))
    )
    return *(found or decoded_size(read_at(tar, start, size))), None


def _with_payload(file_number: int, piece: Piece, with_crc32: bool) -> Piece:
    """The piece with what needs all of its image: crc32, and a size that is hard to find."""
    key, offset, size, width, height, crc32, extension, content = piece
    if offset >= 0 and (with_crc32 or width < 0):
        payload = _read_all(file_number, size, offset)
        crc32 = crc32_of(payload) if with_crc32 else None
        width, height = decoded_size(payload) if width < 0 else (width, height)
    return key, offset, size, width, height, crc32, extension, content


def read_at(tar: tarfile.TarFile, offset: int, size: int) -> bytes:
    tar.fileobj.seek(offset)
    return tar.fileobj.read(size)


def _read_all(file_number: int, size: int, offset: int) -> bytes:
    """One read may give less than it was asked for."""
    payload = os.pread(file_number, size, offset)
    while len(payload) < size:
        more = os.pread(file_number, size - len(payload), offset + len(payload))
        if not more:
            raise OddArchive("it was cut meanwhile")
        payload += more
    return payload


def _split(name: str) -> tuple[str, str]:
    match = MEMBER_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")
