"""Retries: reads that fail for a passing reason are made again, after longer and longer waits."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from datapipe.errors import UnreadableUrl, UnsupportedUrl

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PASSING_STATUSES = frozenset({408, 416, 425, 429})
"""Besides 5xx. 416: the range lies inside the file, which a server may not know yet."""
LASTING = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    UnsupportedUrl,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Whatever else a backend raises may be gone at the next attempt: connections, timeouts, DNS."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and after what waits a read is made again.

    Before attempt n + 1 passes a time drawn from the upper half of
    [0, first_wait_s * 2 ** (n - 1)], at most `longest_wait_s`.
    """

    num_retries: int = 10
    timeout_s: float = 60.0
    """Of one attempt."""
    first_wait_s: float = 0.1
    longest_wait_s: float = 30.0

    def wait_s(self, num_attempts: int, jitter: random.Random) -> float:
        """The time to pass after that many attempts have failed."""
        # Beyond 2 ** 64 the power would only overflow.
        wait_s = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(num_attempts - 1, 64))
        return wait_s * (1 + jitter.random()) / 2


class Retries:
    """Makes calls that read, again and again as a policy says. For use by several threads.

    jitter: of the waits; has to differ from worker to worker, or all come back at once.
    """

    def __init__(
        self, policy: RetryPolicy, *, jitter: random.Random, on_retry: Callable[[], None]
    ) -> None:
        self._policy = policy
        self._jitter = jitter
        self._on_retry = on_retry
        self._closed = threading.Event()

    def call(self, read: Callable[[], Result], *, what: str) -> Result:
        """The result of `read`.

        what: is read, for the message of `UnreadableUrl`, which is raised when the last attempt
        failed. What would fail again is raised at once.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_passing),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(self._policy.num_retries + 1),
                tenacity.stop_when_event_set(self._closed),
            ),
            wait=lambda state: self._policy.wait_s(state.attempt_number, self._jitter),
            sleep=tenacity.sleep_using_event(self._closed),
            before_sleep=lambda state: self._note(state, what),
            reraise=True,
        )
        try:
            return attempts(read)
        except UnreadableUrl as error:
            url, reason = error.args
            number = attempts.statistics["attempt_number"]
            made = "1 attempt" if number == 1 else f"{number} attempts"
            raise UnreadableUrl(url, f"{reason} ({what}, {made})") from error

    def close(self) -> None:
        """Let calls that wait fail with their last reason."""
        self._closed.set()

    def _note(self, state: tenacity.RetryCallState, what: str) -> None:
        assert state.outcome is not None
        self._on_retry()
        logger.info(
            "read failed, is made again what=%s attempt=%d reason=%s",
            what,
            state.attempt_number,
            state.outcome.exception(),
        )


def is_passing(error: BaseException) -> bool:
    """Whether the same read may succeed later: not so for what is forbidden, missing or wrong."""
    if not isinstance(error, UnreadableUrl | OSError):
        return False
    for cause in _causes(error):
        if isinstance(cause, TimeoutError | ConnectionError):
            return True
        status = _status(cause)
        if status is not None:
            return status in PASSING_STATUSES or status >= 500
        if isinstance(cause, LASTING):
            return False
    return True


def status_of(error: BaseException) -> int | None:
    """The HTTP status with which a server answered, if that is what went wrong."""
    statuses = (_status(cause) for cause in _causes(error))
    return next((status for status in statuses if status is not None), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    """As aiohttp, botocore and gcsfs keep it, each in its own way."""
    match error:
        case object(status=int(status)):
            return status
        case object(response={"ResponseMetadata": {"HTTPStatusCode": int(status)}}):
            return status
        case object(code=int(status), message=_) if type(error).__name__ == "HttpError":
            return status
        case OSError() if str(error).startswith("Forbidden: "):  # gcsfs
            return 403
    return None
