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
from datapipe.labels import LABELS_NAME, Label, write_labels
from datapipe.order import Permutation
from datapipe.sources import ImageFile
from datapipe.storage import absolute, join
from datapipe.writer import RawImage, check_unused, write_shards

PACKING_KEY = 5


@dataclass(frozen=True)
class LabelMap:
    """From a class to the labels that its images carry."""

    labels_of_class: Mapping[str, tuple[str, ...]]

    @staticmethod
    def read(path: Path) -> LabelMap:
        """From {class: [labels]}, or {"labels_of_class": {class: [ids]}, "names": {id: name}}.

        With names, a label is called "<id> <name>": names alone need not differ.
        """
        try:
            value = json.loads(path.read_bytes())
            names = value.get("names", {}) if "labels_of_class" in value else {}
            labels_of_class = value.get("labels_of_class", value)
            if not all(isinstance(labels, list) for labels in labels_of_class.values()):
                raise TypeError("the labels of a class are not a list")
            return LabelMap(
                {
                    str(name): tuple(
                        f"{label} {names[label]}" if names else label for label in labels
                    )
                    for name, labels in labels_of_class.items()
                }
            )
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
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


def shuffle_images(images: Sequence[ImageFile], *, seed: int, limit: int | None) -> list[ImageFile]:
    """The images in a seeded order, at most `limit` of them."""
    permutation = Permutation(len(images), key_of(seed, PACKING_KEY))
    numbers = permutation(np.arange(len(images), dtype=np.int64))[:limit]
    return [images[number] for number in numbers.tolist()]


def pack(
    images: Sequence[ImageFile],
    *,
    directory: str,
    label_names: Sequence[str],
    known_labels: Sequence[Label] | None,
    prefix: str,
    shard_bytes: int,
    skip_bad: bool,
    on_image: Callable[[], None],
) -> PackReport:
    """Write images, index and labels.json into `directory`; `on_image` is called after each image.

    Labels get ids in the order of `label_names`, and as weight their share of these images; or both
    are those of `known_labels`. Errors: `PackingError` for a bad image unless `skip_bad`, for a
    label that is not known, and for a directory that is in use.
    """
    check_unused(directory)
    names = [label.name for label in known_labels] if known_labels else list(label_names)
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
                yield RawImage(payload, image.extension, label_ids)
            on_image()

    index = write_shards(
        encoded(),
        directory=directory,
        labels=None,
        prefix=prefix,
        samples_per_shard=None,
        shard_bytes=shard_bytes,
    )
    labels = tuple(known_labels or ()) or tuple(
        Label(number, name, counts[number] / index.num_samples) for name, number in ids.items()
    )
    write_labels(join(absolute(directory), LABELS_NAME), labels)
    return PackReport(index, labels, skipped)


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


def _require_known(names: set[str], known: Mapping[str, object], where: str) -> None:
    unknown = sorted(names - set(known))
    if unknown:
        more = f" and {len(unknown) - NUM_LISTED} more" if len(unknown) > NUM_LISTED else ""
        raise PackingError(
            f"not in {where}: {', '.join(map(repr, unknown[:NUM_LISTED]))}{more}; "
            f"it has {len(known)} entries, such as {next(iter(known), None)!r}"
        )
