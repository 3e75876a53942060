"""What this installation decodes and reads with; if it is the slow way, why, and what to do."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from importlib.metadata import version

from datapipe import native_walk
from datapipe.decode import active_kernel

APT_LINE = "apt-get install -y gcc libjpeg62-turbo-dev"
INSTALL_LINE = "pip install --force-reinstall --no-deps ."
PROBE = "#include <stdio.h>\n#include <jpeglib.h>\nint has_skipping = JCS_EXT_RGBX;\n"
"""Compiles and links where the native kernel does."""


def report() -> str:
    """Several lines of text, for a person."""
    kernel = active_kernel()
    lines = [f"JPEG decoder    {kernel.name}: {kernel.detail}"]
    if kernel.name == "fallback":
        lines += [
            f"                in use: simplejpeg {version('simplejpeg')}, torch {version('torch')}",
            "                decoding takes 2 to 3 times as long; no restart markers can be added",
            *(f"                {line}" for line in remedy(_compiler())),
        ]
    walk = "native" if native_walk.is_available() else "tarfile: the index takes ten times as long"
    lines += [
        f"PNG, WebP       Pillow {version('pillow')}",
        f"tar headers     {walk}",
        f"machine         {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}",
    ]
    return "\n".join(lines) + "\n"


def remedy(compiler: Sequence[str]) -> list[str]:
    """What keeps the native kernel from being built with this command, and what to do next."""
    if not compiler or not shutil.which(compiler[0]):
        return ["there is no C compiler", f"next: {APT_LINE}, then {INSTALL_LINE}"]
    found = subprocess.run(
        [*compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", os.devnull, "-ljpeg"],
        input=PROBE,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no reason given"])[0]
        return [
            f"{compiler[0]} does not find libjpeg-turbo: {reason}",
            f"next: {APT_LINE}, then {INSTALL_LINE}",
        ]
    return [
        f"{compiler[0]} and libjpeg-turbo are here",
        f"next, where the sources are: {INSTALL_LINE}",
    ]


def _compiler() -> list[str]:
    """The command that setuptools compiles with."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
