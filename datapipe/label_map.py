"""LabelMap: from the classes of a source to the labels that their images carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datapipe.errors import NUM_LISTED, PackingError
from datapipe.json_text import parse_json
from datapipe.sources import ImageFile


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
            value = parse_json(path.read_bytes())
            names = value.get("names", {}) if "labels_of_class" in value else {}
            return LabelMap(
                {
                    name: tuple(_label_name(label, names) for label in _as_list(labels))
                    for name, labels in value.get("labels_of_class", value).items()
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
        require_known(classes, self.labels_of_class, "the label map")
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


def require_known(names: set[str], known: Mapping[str, object], where: str) -> None:
    """Raise `PackingError` that lists the names that are not known."""
    unknown = sorted(names - set(known))
    if unknown:
        more = f" and {len(unknown) - NUM_LISTED} more" if len(unknown) > NUM_LISTED else ""
        raise PackingError(
            f"not in {where}: {', '.join(map(repr, unknown[:NUM_LISTED]))}{more}; "
            f"it has {len(known)} entries, such as {next(iter(known), None)!r}"
        )


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
