"""The native parts, installed beside the two packages; all the rest is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[Extension("datapipe_tar_walk", ["native/tar_walk.c"], optional=True)],
)
