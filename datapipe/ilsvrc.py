"""The two archives of ILSVRC 2012 as they are downloaded, read in place.

ILSVRC2012_img_train.tar holds a tar a class, n01440764.tar, of n01440764_10026.JPEG and so on.
ILSVRC2012_img_val.tar holds ILSVRC2012_val_00000001.JPEG, ... without classes. Those are in the
development kit: ILSVRC2012_validation_ground_truth.txt has a line an image, with an ILSVRC2012_ID.
That is a number of the kit's own, from 1, in no order of names; meta.mat tells the synset of each.
The other form that is in use is a list with the synset itself in each line. Labels are synsets.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from datapipe.errors import PackingError
from datapipe.sources import ILSVRC_NAME, ImageFile, Listing, is_image, kind_of, list_files
from datapipe.tar_walk import members, open_tar

CLASS_TAR = re.compile(r"(n\d{8})\.tar")
SYNSET = re.compile(r"n\d{8}")
VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
ID_FIELD = "ILSVRC2012_ID"
NOT_SYNSETS = (TypeError, KeyError, IndexError, NotImplementedError)
"""What reading another MATLAB file as meta.mat raises."""


def list_train(source: Path) -> Listing:
    """The images of ILSVRC2012_img_train.tar by class and name. `PackingError` for another tar."""
    if not source.is_file():
        raise PackingError(f"{source}: is no file; expected ILSVRC2012_img_train.tar")
    listing = Listing()
    try:
        with source.open("rb") as file, open_tar(file) as outer:
            for member in members(outer):
                match = CLASS_TAR.fullmatch(PurePosixPath(member.name).name)
                if match is None or not member.isreg():
                    listing.left_out[kind_of(PurePosixPath(member.name))] += not member.isdir()
                    continue
                with source.open("rb") as inner:
                    stop = member.offset_data + member.size
                    inner.seek(member.offset_data)
                    _add_class(listing, source, match[1], inner, stop)
    except tarfile.TarError as error:
        raise PackingError(f"{source}: {error}; download it again") from error
    if not listing.images:
        raise PackingError(
            f"{source}: holds no tar of a class, such as n01440764.tar; expected "
            "ILSVRC2012_img_train.tar as it is downloaded; a folder a class, or a tar of that, "
            "needs no --recipe"
        )
    listing.images.sort(key=lambda image: image.name)
    return listing


def _add_class(listing: Listing, source: Path, synset: str, file: IO[bytes], stop: int) -> None:
    """Add the images of the tar that begins where `file` is, and ends before `stop`."""
    with open_tar(file) as tar:
        for member in members(tar):
            if member.offset_data + member.size > stop:
                raise tarfile.ReadError(f"{synset}.tar has no end at byte {stop}")
            name = PurePosixPath(member.name).name
            if not member.isreg() or not is_image(PurePosixPath(name)):
                listing.left_out[kind_of(PurePosixPath(name))] += not member.isdir()
                continue
            match = ILSVRC_NAME.fullmatch(name)
            if match is not None and match[1] != synset:
                raise PackingError(f"{source}: {name} lies in {synset}.tar; download it again")
            listing.images.append(
                ImageFile(f"{synset}/{name}", (synset,), source, member.offset_data, member.size)
            )


def list_validation(source: Path, *, ground_truth: Path, meta: Path | None) -> Listing:
    """The validation images with the synsets of their numbers.

    Raises `PackingError` if the source is anything else, or not all of the images, and if the
    ground truth could be understood in two ways.
    """
    synsets = read_ground_truth(ground_truth, meta)

    def labels_of(name: str) -> tuple[str, ...]:
        match = VALIDATION_NAME.fullmatch(PurePosixPath(name).name)
        if match is None:
            raise PackingError(
                f"{source}: {name} is no validation image; expected ILSVRC2012_val_00000001.JPEG "
                "and so on; a folder a class needs no --recipe"
            )
        number = int(match[1])
        if not 1 <= number <= len(synsets):
            raise PackingError(
                f"{source}: {name} has no line in {ground_truth}, which has {len(synsets)}"
            )
        return (synsets[number - 1],)

    listing = list_files(source, labels_of, expected="ILSVRC2012_val_00000001.JPEG, ...")
    numbers = {int(PurePosixPath(image.name).stem[-8:]) for image in listing.images}
    if len(listing.images) != len(synsets) or len(numbers) != len(synsets):
        gone = min(set(range(1, len(synsets) + 1)) - numbers, default=None)
        first = "some are there twice" if gone is None else f"number {gone} is missing"
        raise PackingError(
            f"{source}: {len(listing.images)} images, but {len(synsets)} lines in {ground_truth}; "
            f"{first}; download the images again, or give the list that belongs to them"
        )
    return listing


def read_ground_truth(path: Path, meta: Path | None) -> list[str]:
    """The synset of each validation image, in the order of their numbers. Raises `PackingError`."""
    lines = _lines(path)
    if all(SYNSET.fullmatch(line) for line in lines):
        if meta is not None:
            raise PackingError(f"{path}: holds synsets already; leave --meta out")
        return lines
    bad = next((number for number, line in enumerate(lines, 1) if not line.isdecimal()), None)
    if bad is not None:
        raise PackingError(
            f"{path}: line {bad} is {lines[bad - 1]!r}; allowed: an {ID_FIELD} a line "
            "(ILSVRC2012_validation_ground_truth.txt), or a synset such as n01440764 a line"
        )
    if meta is None:
        raise PackingError(
            f"{path}: holds numbers, which are in no order of names; give --meta "
            "ILSVRC2012_devkit_t12/data/meta.mat, which says what they are"
        )
    synset_of_id = read_meta(meta)
    unknown = sorted({int(line) for line in lines} - set(synset_of_id))
    if unknown:
        raise PackingError(
            f"{path}: there is no class {unknown[0]}; {meta} has 1 to {len(synset_of_id)}; a list "
            "that counts from 0 is of another numbering: give one of synsets"
        )
    return [synset_of_id[int(line)] for line in lines]


def read_meta(path: Path) -> dict[int, str]:
    """From ILSVRC2012_ID to synset, of the classes without subclasses. Raises `PackingError`."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise PackingError(f"{path}: reading it needs scipy; pip install scipy") from error
    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        found = [
            (int(row[ID_FIELD]), str(row["WNID"])) for row in rows if not int(row["num_children"])
        ]
    except (MatReadError, zlib.error, EOFError, OSError, ValueError, *NOT_SYNSETS) as error:
        raise PackingError(
            f"{path}: not the meta.mat of ILSVRC2012_devkit_t12 ({error!r})"
        ) from error
    synsets = dict(found)
    is_numbered = sorted(number for number, _ in found) == list(range(1, len(found) + 1))
    if not is_numbered or not all(map(SYNSET.fullmatch, synsets.values())):
        raise PackingError(f"{path}: {ID_FIELD} are not 1, 2, 3, ... of one synset each")
    return synsets


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text("ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PackingError(f"{path}: cannot be read: {error}") from error
    lines = [line.strip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise PackingError(f"{path}: is empty; expected a line for each validation image")
    return lines
