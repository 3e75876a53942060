"""Recipes: sources that are laid out as well-known data sets are downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datapipe.ilsvrc import list_train, list_validation
from datapipe.open_images import list_open_images
from datapipe.sources import Listing, list_images

RecipeName = Literal["ilsvrc-train", "ilsvrc-validation", "open-images"]

RECIPE_OF_OPTION: dict[str, RecipeName] = {
    "ground_truth": "ilsvrc-validation",
    "meta": "ilsvrc-validation",
    "image_labels": "open-images",
    "class_descriptions": "open-images",
}
NEEDED_OPTIONS = {"ilsvrc-validation": "ground_truth", "open-images": "image_labels"}


@dataclass(frozen=True)
class Recipe:
    """How a source is laid out, and the files that go with it; without a name, as folders."""

    name: RecipeName | None = None
    ground_truth: Path | None = None
    meta: Path | None = None
    image_labels: Path | None = None
    class_descriptions: Path | None = None

    def __post_init__(self) -> None:
        for option, recipe in RECIPE_OF_OPTION.items():
            if getattr(self, option) is not None and self.name != recipe:
                raise ValueError(f"{_flag(option)} belongs to --recipe {recipe}")
        needed = NEEDED_OPTIONS.get(self.name or "")
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"--recipe {self.name} needs {_flag(needed)}")

    def list_images(self, source: Path) -> Listing:
        """The images of a source and their labels. `PackingError` if it is laid out otherwise."""
        if self.name == "ilsvrc-train":
            return list_train(source)
        if self.name == "ilsvrc-validation":
            assert self.ground_truth is not None
            return list_validation(source, ground_truth=self.ground_truth, meta=self.meta)
        if self.name == "open-images":
            assert self.image_labels is not None
            return list_open_images(
                source, image_labels=self.image_labels, descriptions=self.class_descriptions
            )
        return list_images(source)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
