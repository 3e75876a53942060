"""RangeReader: ranges of shards, from a local cache or from storage, with retries and counters."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Self, TypeVar

from datapipe.block_cache import BlockCache
from datapipe.config import DataConfig
from datapipe.counters import ReadCounters
from datapipe.errors import UnreadableUrl
from datapipe.retries import Retries, RetryPolicy
from datapipe.storage import read_range, size_of, within

Result = TypeVar("Result")

CUT_SHORT = "the answer was cut short"
OUTSIDE_OF_TRAINING = RetryPolicy(num_retries=4)
"""A second or two: somebody waits, or the address is wrong."""


def read_again(read: Callable[[], Result], *, url: str, what: str) -> Result:
    """What a read of `url` returns, made again a few times where it fails for a passing reason.

    Errors: those of `read`; `UnreadableUrl`.
    """
    return RangeReader(OUTSIDE_OF_TRAINING).call(read, url=url, what=what)


class RangeReader:
    """Reads ranges of shards; for use by several threads.

    With a cache, a range of a remote file is read from storage once. Files of this machine are
    read where they lie.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        cache: BlockCache | None = None,
        jitter: random.Random | None = None,
    ) -> None:
        """jitter: of the waits between attempts, by default another one in every process."""
        self._policy = policy or RetryPolicy()
        self._cache = cache
        self._counters = ReadCounters()
        self._counting = threading.Lock()
        self._retries = Retries(
            self._policy,
            jitter=jitter or random.Random(),
            on_retry=lambda: self._count(num_retries=1),
        )

    @classmethod
    def of_config(cls, config: DataConfig) -> Self:
        cache = (
            BlockCache(config.cache_dir, max_bytes=int(config.cache_gb * 1e9))
            if config.cache_dir is not None
            else None
        )
        policy = RetryPolicy(num_retries=config.read_retries, timeout_s=config.read_timeout_s)
        return cls(policy, cache=cache)

    def counters(self) -> ReadCounters:
        return self._counters

    def read(self, url: str, start: int, stop: int, *, version: str) -> memoryview:
        """The bytes [start, stop) of a shard; fewer where the shard ends early.

        version: differs where the shard's content does; what the cache holds of another one is not
        used. Errors: `FileNotFoundError` or `NotADirectoryError`; `UnreadableUrl`.
        """
        if self._cache is None or "://" not in url:
            return memoryview(self._read_storage(url, start, stop))
        name = f"{url} {version} {start} {stop}"
        kept = self._cache.get(name)
        if kept is not None:
            self._count(num_cache_hits=1)
            return kept
        self._count(num_cache_misses=1)
        content = self._read_storage(url, start, stop)
        if len(content) == stop - start:
            self._cache.put(name, content)
        return memoryview(content)

    def call(self, read: Callable[[], Result], *, url: str, what: str) -> Result:
        """What another read, of `url`, returns, with the same retries and limits.

        Errors: those of `read`; `UnreadableUrl`.
        """
        timeout_s = self._policy.timeout_s if "://" in url else None

        def attempt() -> Result:
            try:
                return within(timeout_s, read)
            except TimeoutError as error:
                raise UnreadableUrl(url, str(error)) from error

        return self._retries.call(attempt, what=what)

    def close(self) -> None:
        """Let what waits for its next attempt fail."""
        self._retries.close()

    def _read_storage(self, url: str, start: int, stop: int) -> bytes:
        what = f"bytes {start} to {stop - 1}"
        content = self._retries.call(lambda: self._attempt(url, start, stop), what=what)
        self._count(bytes_read=len(content), num_reads=1)
        return content

    def _attempt(self, url: str, start: int, stop: int) -> bytes:
        """Raises `UnreadableUrl` if fewer bytes come than the shard has."""
        timeout_s = self._policy.timeout_s
        content = read_range(url, start, stop, timeout_s=timeout_s)
        if len(content) == stop - start or "://" not in url:
            return content
        try:
            end = size_of(url, timeout_s=timeout_s)
        except FileNotFoundError as error:  # HTTP's answer to any failure
            raise UnreadableUrl(url, CUT_SHORT) from ConnectionError(str(error))
        if len(content) < min(stop, end) - start:
            raise UnreadableUrl(url, f"{CUT_SHORT}: {len(content)} of {stop - start} bytes")
        return content

    def _count(self, **changes: int) -> None:
        with self._counting:
            self._counters += ReadCounters(**changes)
