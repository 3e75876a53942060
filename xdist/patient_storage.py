"""Patient storage: what refuses to be written or read is tried again for a while."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

from tenacity import (
    Retrying,
    before_sleep_log,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from datapipe.errors import UnreadableUrl
from datapipe.storage import read_bytes, size_of, write_bytes
from xdist.errors import PartMissing, RunDirectoryError

STORING_LIMIT_S = 10.0
"""What the storage refuses is tried again so long: more than `fault_history.EVENT_S`, so that each
time is a fault of its own.
"""

logger = logging.getLogger(__name__)


def patient(*, but: type[OSError] | tuple[()] = ()) -> Retrying:
    """Tries for a while what a storage refuses: what it lacks may pass. but: what may not."""

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, OSError | UnreadableUrl) and not isinstance(error, but)

    return Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(STORING_LIMIT_S),
        wait=wait_random_exponential(multiplier=0.5, max=2.0),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
    )


def store(url: str, payload: bytes | memoryview, *, beneath: str) -> None:
    """Write a file. beneath: the directory that must be there, if it is a local one. Raises
    `RunDirectoryError`.
    """

    def write() -> None:
        if "://" not in url and not Path(beneath).is_dir():
            raise FileNotFoundError(f"{beneath} is not there; was its file system unmounted?")
        write_bytes(url, payload, durable=True)

    try:
        patient()(write)
    except OSError as error:
        host = platform.node()
        raise RunDirectoryError(f"{url} cannot be written from {host}: {error}") from error


def fetch(url: str) -> bytes:
    """Read a file. Raises `FileNotFoundError` at once, and `UnreadableUrl`."""
    return patient(but=FileNotFoundError)(read_bytes, url)


def require(url: str, num_bytes: int) -> None:
    """Raise `PartMissing` where no file of this size is there, nor comes: what another node wrote
    may be seen here only after a while. (A listing might know of it later still.)
    """

    def look() -> None:
        if (found := size_of(url)) != num_bytes:
            raise FileNotFoundError(f"{url} has {found} bytes, not {num_bytes}")

    try:
        patient()(look)
    except FileNotFoundError as error:
        raise PartMissing(
            f"{url} was written by one of the nodes and is not there; "
            "give --run-dir a directory that all nodes share, or a URL (s3://, gs://)"
        ) from error
    except (OSError, UnreadableUrl) as error:
        raise RunDirectoryError(f"{url} cannot be found again: {error}") from error
