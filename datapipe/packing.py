"""Packing: images from a source -> shards, with label names turned into ids.

Images are packed in an order shuffled by a seed, so that every block of a shard is a mixture; the
same source, seed and options give the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from datapipe.decode import DecodeError, check_decodes
from datapipe.errors import NUM_LISTED, PackingError
from datapipe.hashing import key_of
from datapipe.index import ShardIndex
from datapipe.labels import Label
from datapipe.order import Permutation
from datapipe.sources import ImageFile
from datapipe.storage import absolute, local_path
from datapipe.writer import RawImage, write_shards

PACKING_KEY = 5


@dataclass(frozen=True)
class LabelMap:
    """From a class to the labels that its images carry."""

    labels_of_class: Mapping[str, tuple[str, ...]]

    @staticmethod
    def read(path: Path) -> LabelMap:
        """From {class: [labels]}, or {"labels_of_class": {class: [ids]}, "names": {id: name}}.

        Labels are text or integers. With names, a label is called "<id> <name>": names alone need
        not differ.
        """
        try:
            value = json.loads(path.read_bytes())
            names = value.get("names", {}) if "labels_of_class" in value else {}
            return LabelMap(
                {
                    name: tuple(_label_name(label, names) for label in _as_list(labels))
                    for name, labels in value.get("labels_of_class", value).items()
                }
            )
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise PackingError(
                f"{path}: not a label map ({error!r}); allowed: "
                '{"class": ["label", ...]} or {"labels_of_class": {...}, "names": {...}}'
            ) from error

    def apply(self, images: Sequence[ImageFile]) -> list[ImageFile]:
        """The images with their classes' labels. `PackingError` for classes that are not mapped."""
        classes = {name for image in images for name in image.labels}
        _require_known(classes, self.labels_of_class, "the label map")
        return [
            replace(
                image,
                labels=tuple(
                    dict.fromkeys(
                        label for name in image.labels for label in self.labels_of_class[name]
                    )
                ),
            )
            for image in images
        ]


@dataclass
class PackReport:
    """What was packed; `skipped` names each bad image and why."""

    index: ShardIndex
    labels: tuple[Label, ...]
    skipped: list[str] = field(default_factory=list)


def label_names(images: Sequence[ImageFile]) -> list[str]:
    """The labels of these images, in the order of their ids: by number if all are numbers, else by
    name.
    """
    names = sorted({label for image in images for label in image.labels})
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def shuffle_images(images: Sequence[ImageFile], *, seed: int, limit: int | None) -> list[ImageFile]:
    """The images in a seeded order, at most `limit` of them."""
    permutation = Permutation(len(images), key_of(seed, PACKING_KEY))
    numbers = permutation(np.arange(len(images), dtype=np.int64))[:limit]
    return [images[number] for number in numbers.tolist()]


def pack(
    images: Sequence[ImageFile],
    *,
    directory: str,
    names: Sequence[str],
    known_labels: Sequence[Label] | None,
    prefix: str,
    shard_bytes: int,
    skip_bad: bool,
    on_image: Callable[[], None],
) -> PackReport:
    """Write images, index and labels.json into `directory`; `on_image` is called after each image.

    Labels get ids in the order of `names`, and as weight their share of the packed images; or both
    are those of `known_labels`. Errors: `PackingError` for a bad image unless `skip_bad`, for a
    label that is not known, for images that lie in `directory`; those of `write_shards`.
    """
    _check_apart(images, directory)
    names = [label.name for label in known_labels] if known_labels else names
    ids = {name: number for number, name in enumerate(names)}
    _require_known({name for image in images for name in image.labels}, ids, "the labels given")
    skipped: list[str] = []
    counts: Counter[int] = Counter()

    def encoded() -> Iterator[RawImage]:
        for image in images:
            payload = _checked_payload(image, skipped, skip_bad=skip_bad)
            if payload is not None:
                label_ids = tuple(ids[name] for name in dict.fromkeys(image.labels))
                counts.update(label_ids)
                yield RawImage(payload, image.extension, label_ids, image.short_name)
            on_image()

    def labels() -> Iterator[Label]:
        num_packed = len(images) - len(skipped)
        for name, number in ids.items():
            yield Label(number, name, counts[number] / num_packed)

    index = write_shards(
        encoded(),
        directory=directory,
        labels=known_labels or labels(),
        prefix=prefix,
        samples_per_shard=None,
        shard_bytes=shard_bytes,
    )
    return PackReport(index, tuple(known_labels or labels()), skipped)


def _check_apart(images: Sequence[ImageFile], directory: str) -> None:
    """Raise `PackingError` if an image, or the tar it is in, lies where shards are written."""
    output = local_path(absolute(directory))
    if output is None:
        return
    output = output.resolve()
    for folder in {image.path.parent for image in images}:
        if folder.resolve().is_relative_to(output):
            raise PackingError(
                f"{directory}: images to be packed lie in {folder}; choose another directory"
            )


def _checked_payload(image: ImageFile, skipped: list[str], *, skip_bad: bool) -> bytes | None:
    """The image's bytes if all of it decodes; else None, and a line in `skipped`."""
    try:
        payload = image.read()
        check_decodes(payload)
    except (OSError, DecodeError) as error:
        reason = f"{image.name}: {error}"
        if not skip_bad:
            raise PackingError(
                f"{reason}; repair it, or leave bad images out with --skip-bad"
            ) from error
        skipped.append(reason)
        return None
    return payload


def _as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("the labels of a class are not a list")
    return value


def _label_name(label: object, names: Mapping[str, object]) -> str:
    return f"{_text(label)} {_text(names[_text(label)])}" if names else _text(label)


def _text(value: object) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is neither text nor an integer")
    return str(value)


def _require_known(names: set[str], known: Mapping[str, object], where: str) -> None:
    unknown = sorted(names - set(known))
    if unknown:
        more = f" and {len(unknown) - NUM_LISTED} more" if len(unknown) > NUM_LISTED else ""
        raise PackingError(
            f"not in {where}: {', '.join(map(repr, unknown[:NUM_LISTED]))}{more}; "
            f"it has {len(known)} entries, such as {next(iter(known), None)!r}"
        )
