"""The same images in every pipeline's own format."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


class NotMade(Exception):
    """A data set could not be written; the text says why."""


def images_at_hand() -> Path:
    """Real photographs: $XDIST_SHARED/data/imagenet-sample, or ../shared/data/imagenet-sample."""
    return Path(os.environ.get("XDIST_SHARED", ROOT.parent / "shared")) / "data/imagenet-sample"


def link_images(source: Path, directory: Path, *, copies: int) -> int:
    """A folder for each image of `source` with `copies` links to it; how many links there are.

    Raises `NotMade`.
    """
    images = sorted(path for path in source.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not images:
        raise NotMade(f"{source}: no .jpg or .jpeg files; name a folder of some with --source")
    for image in images:
        folder = directory / image.stem
        folder.mkdir(parents=True)
        for number in range(copies):
            (folder / f"{number}{image.suffix}").symlink_to(image.resolve())
    return len(images) * copies


def labelled_images(folder: Path) -> list[tuple[Path, int]]:
    """The images in a folder of folders, each with its folder's number, in one shuffled order."""
    folders = sorted(folder.iterdir())
    images = [
        (path, label) for label, part in enumerate(folders) for path in sorted(part.iterdir())
    ]
    random.Random(0).shuffle(images)
    return images


def pack(images: Path, directory: Path, *, shard_mb: int, options: list[str]) -> None:
    """Our shards, written by the job that users run. Raises `NotMade`."""
    job = [sys.executable, "jobs/pack_shards.py", str(images), str(directory)]
    _run([*job, "--shard-mb", str(shard_mb), *options])


def write_with(peer: str, python: Path, images: Path, directory: Path) -> None:
    """A peer's shards, written by its own writer. Raises `NotMade`."""
    module = f"tests.benchmarks.peers.{peer}"
    _run([str(python), "-m", module, "write", str(images), str(directory)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise NotMade(f"{' '.join(command[1:4])}: {''.join(last)}")
