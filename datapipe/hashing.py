"""Keyed hashes of integers: the only source of randomness in this package.

Whatever is random here (order, augmentation) is a pure function of a few integers, so it needs no
state, no start-up, and comes out the same on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014; one step."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def key_of(*parts: int) -> np.uint64:
    """One 64-bit key from several integers; their order matters."""
    key = 0
    for part in parts:
        key = _splitmix64(key ^ (part & MASK))
    return np.uint64(key)


def uniforms(keys: NDArray[np.uint64], *, num_draws: int) -> NDArray[np.float64]:
    """(N,) keys -> (N, num_draws) numbers in [0, 1), independent of one another."""
    counters = np.arange(num_draws, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    draws = splitmix64(splitmix64(keys[:, None] + counters))
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(value: int) -> int:
    """`splitmix64` of one Python integer, without numpy's cost a call."""
    mixed = (value + 0x9E3779B97F4A7C15) & MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
    return mixed ^ (mixed >> 31)
