"""The native parts, installed beside the two packages; all the rest is in pyproject.toml.

Each is a library behind a module's name: sources that are put before the installed packages (a
submitted working directory) carry nothing compiled, and must not hide it. None holds a Python
interface or is imported: they are found by their names and called by ctypes. Where there is no
compiler, or not libjpeg-turbo's headers, the installation goes on without them.
"""

from __future__ import annotations

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension("datapipe_tar_walk", ["native/tar_walk.c"], optional=True),
        Extension(
            "xdist_board",
            sources=["native/board.c"],
            depends=["native/stream.h", "native/widening.h"],
            extra_compile_args=["-O3", "-std=gnu11"],
            optional=True,
        ),
        Extension(
            "xdist_update",
            sources=["native/update.c", "native/bfloat16.c"],
            depends=[
                "native/bfloat16.h",
                "native/cpus.h",
                "native/rounding.h",
                "native/stream.h",
                "native/widening.h",
            ],
            libraries=["m"],
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fno-trapping-math",
            ],
            optional=True,
        ),
        Extension(
            "datapipe_native",
            sources=sorted(glob("native/jpeg/*.c")),
            depends=sorted(glob("native/jpeg/*.h")),
            libraries=["jpeg", "m"],
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off"],
            optional=True,
        ),
    ]
)
