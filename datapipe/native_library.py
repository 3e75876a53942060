"""The compiled libraries that are installed beside the packages, where a compiler was present."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec


def load_library(module: str, *, abi_function: str, abi_version: int) -> ctypes.CDLL | None:
    """The library of that name; None where it is not built, or not for these sources: the function
    says which interface it has.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        return library if library[abi_function]() == abi_version else None
    except (OSError, AttributeError):
        return None
