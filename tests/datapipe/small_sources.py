"""Small sources of images to be packed."""

from __future__ import annotations

from pathlib import Path

from datapipe.labels import Label
from datapipe.packing import Packing, PackOptions, label_names, shuffle_images
from datapipe.parallel_packing import pack_shards
from datapipe.payloads import PayloadOptions
from datapipe.sources import ImageFile, list_images
from tests.datapipe.small_sets import encode, picture

OPTIONS = PackOptions(shard_bytes=12_000, payloads=PayloadOptions(restart_markers=False))
"""5 images of `write_photos` a shard."""


def write_photos(folder: Path, *, num_images: int = 40) -> Path:
    """Images of four classes, in a folder each."""
    for number in range(num_images):
        path = folder / f"class{number % 4}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number)))
    return folder


def images_in(folder: Path) -> list[ImageFile]:
    return shuffle_images(list_images(folder).images, seed=0, limit=None)


def packing_of(
    photos: Path,
    output: Path | str,
    *,
    options: PackOptions = OPTIONS,
    known_labels: list[Label] | None = None,
) -> Packing:
    images = images_in(photos)
    return Packing(
        images,
        directory=str(output),
        names=label_names(images),
        known_labels=known_labels,
        options=options,
    )


def finish(photos: Path, output: Path, *, num_processes: int = 1) -> int:
    """Write what is missing and finish; how many shards were written."""
    packing = packing_of(photos, output)
    jobs = packing.jobs()
    for _ in pack_shards(jobs, num_processes=num_processes, on_images=lambda _: None):
        pass
    packing.finish()
    return len(jobs)


def files_in(directory: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
