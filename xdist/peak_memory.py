"""The most memory that a process has held."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

MIB_KIB, MIB_BYTES = 1 << 10, 1 << 20


@dataclass(frozen=True)
class PeakMemory:
    """Since it began."""

    host_mib: float
    gpu_mib: float | None
    """Of torch's allocator; None without a GPU."""


def peak_memory(device: torch.device) -> PeakMemory:
    """Of this process, which computes there."""
    host_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB_KIB
    is_on_gpu = device.type == "cuda"
    gpu_mib = torch.cuda.max_memory_allocated(device) / MIB_BYTES if is_on_gpu else None
    return PeakMemory(host_mib, gpu_mib)
