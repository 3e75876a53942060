"""Environments of other pipelines: each its own, made once, with this project's torch and Pillow.

So all that is compared decodes with one Pillow and collates with one torch; what a peer pins
differently (mosaicml-streaming: numpy) comes from its own environment, which is searched first.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """What pip installs for it: all dependencies would bring the clients of every cloud."""

    name: str
    """Also of its module here."""
    packages: tuple[str, ...]
    """Installed with what they depend on."""
    bare_packages: tuple[str, ...]
    """Installed without."""


PEERS = (
    Peer(
        "mosaic",
        packages=(
            "boto3",
            "Brotli",
            "catalogue",
            "filelock",
            "numpy<2.2",
            "python-snappy",
            "requests",
            "tqdm",
            "transformers<5",
            "xxhash",
            "zstd",
        ),
        bare_packages=("mosaicml-streaming", "torchvision"),
    ),
    Peer(
        "litdata",
        packages=("boto3", "filelock", "lightning-utilities", "obstore", "requests", "tifffile"),
        bare_packages=("litdata",),
    ),
)
RAY_TRAIN = Peer("ray_train", packages=(), bare_packages=("pandas",))
"""What Ray Train imports and this project's environment lacks."""


class NotInstallable(Exception):
    """pip could not install a peer here; the text says why."""


def python_of(peer: Peer, directory: Path) -> Path:
    """The interpreter of the peer's environment in `directory`. Raises `NotInstallable`."""
    environment = directory / peer.name
    python = environment / "bin" / "python"
    complete = environment / "complete"
    if complete.exists():
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(environment)])
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if peer.packages:
        _run([*install, *peer.packages])
    _run([*install, "--no-deps", *peer.bare_packages])
    _see_this_environment(python)
    complete.touch()
    return python


def packages_of(python: Path) -> str:
    """The directory of what is installed beside an interpreter."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return _run([str(python), "-c", script]).strip()


def _see_this_environment(python: Path) -> None:
    """Let the interpreter import what is not installed beside it from where this one does."""
    path_file = Path(packages_of(python)) / "zz_project.pth"
    path_file.write_text(sysconfig.get_path("purelib") + "\n")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise NotInstallable(errors[-1])
    return done.stdout
