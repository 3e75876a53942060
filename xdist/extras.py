"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from types import ModuleType

from xdist.errors import UserError


def require(module: str, *, extra: str, reason: str) -> ModuleType:
    """Import an optional package. Raises `UserError` with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{reason}, which needs {error.name}; install it with pip install '.[{extra}]'"
        ) from error
