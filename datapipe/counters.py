"""What a stream has read and given so far."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class ReadCounters:
    """What was read of shards."""

    bytes_read: int = 0
    """From storage; what the cache held is not among them."""
    num_reads: int = 0
    """Ranges that storage delivered."""
    num_retries: int = 0
    """Attempts that failed and were followed by another one."""
    num_cache_hits: int = 0
    num_cache_misses: int = 0

    def __add__(self, other: ReadCounters) -> ReadCounters:
        return ReadCounters(
            *(getattr(self, one.name) + getattr(other, one.name) for one in fields(self))
        )

    def __sub__(self, other: ReadCounters) -> ReadCounters:
        return ReadCounters(
            *(getattr(self, one.name) - getattr(other, one.name) for one in fields(self))
        )


@dataclass(frozen=True)
class StreamCounters:
    """What a stream has given, and how long it was waited for."""

    num_batches: int = 0
    num_samples: int = 0
    """Those that count: neither corrupt ones nor repetitions."""
    num_corrupt: int = 0
    """Corrupt samples that were met, each as often as that was."""
    data_wait_s: float = 0.0
    """Seconds in `next`."""
    read: ReadCounters = field(default_factory=ReadCounters)
    """Up to the last batch, ahead of it too."""
