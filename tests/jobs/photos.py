"""A small source of images, and the command that packs it."""

from __future__ import annotations

from pathlib import Path

import pack_shards
import pytest
from PIL import Image


def save_image(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), (colour, 90, 90)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cats and two dogs in folders of their own, and a file that is no image."""
    root = tmp_path / "photos"
    for number in range(3):
        save_image(root / "cat" / f"{number}.jpg", 10 * number)
    for number in range(2):
        save_image(root / "dog" / f"{number}.JPEG", 100 + 10 * number)
    (root / "cat" / "notes.txt").write_text("not an image")
    return root


def pack(*arguments: object) -> int:
    return pack_shards.main([str(argument) for argument in arguments])


def write_csv(path: Path, rows: dict[str, str]) -> Path:
    lines = [f'{image},"{labels}"' for image, labels in rows.items()]
    path.write_text("\n".join(["path,labels", *lines]) + "\n")
    return path
