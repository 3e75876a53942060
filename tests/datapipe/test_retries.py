"""Retries: of what may pass, after growing waits; a lasting error at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from aiohttp import ClientPayloadError, ClientResponseError, RequestInfo
from botocore.exceptions import ClientError
from fsspec.exceptions import FSTimeoutError
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy
from s3fs.errors import translate_boto_error
from yarl import URL

from datapipe.errors import UnreadableUrl
from datapipe.retries import Retries, RetryPolicy, is_passing, status_of


def http_error(status: int) -> ClientResponseError:
    url = URL("http://shards/a.tar")
    request = RequestInfo(url, "GET", CIMultiDictProxy(CIMultiDict()), url)
    return ClientResponseError(request, (), status=status, message="message")


def s3_error(code: str, status: int) -> Exception:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(answer, "GetObject"))
    return error


def unreadable(cause: Exception) -> UnreadableUrl:
    error = UnreadableUrl("http://shards/a.tar", "reason")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "cause",
    [
        http_error(500),
        http_error(503),
        http_error(429),
        http_error(408),
        s3_error("SlowDown", 503),
        s3_error("InternalError", 500),
        s3_error("RequestTimeout", 400),
        ClientPayloadError("not completed"),
        FSTimeoutError(),
        TimeoutError(),
        ConnectionResetError(),
        OSError(5, "Input/output error"),
    ],
    ids=repr,
)
def test_what_may_pass_is_tried_again(cause: Exception) -> None:
    assert is_passing(unreadable(cause))


@pytest.mark.parametrize(
    "cause",
    [
        http_error(400),
        http_error(401),
        http_error(403),
        http_error(404),
        s3_error("AccessDenied", 403),
        s3_error("NoSuchKey", 404),
        OSError("Forbidden: https://storage.googleapis.com/a.tar\n"),
        PermissionError(),
        ValueError("bad URL"),
    ],
    ids=repr,
)
def test_what_would_fail_again_is_not(cause: Exception) -> None:
    assert not is_passing(unreadable(cause))


@pytest.mark.parametrize(
    ("cause", "status"),
    [(http_error(416), 416), (s3_error("InvalidRange", 416), 416), (TimeoutError(), None)],
    ids=repr,
)
def test_the_status_of_an_answer_is_found(cause: Exception, status: int | None) -> None:
    assert status_of(unreadable(cause)) == status


@dataclass
class Storage:
    """A read that fails so often, then succeeds."""

    errors: Iterator[Exception]
    num_retries: int = 0
    waits: Callable[[], None] = field(default=lambda: None)

    def read(self) -> str:
        for error in self.errors:
            raise error
        return "content"

    def retries(self, policy: RetryPolicy) -> Retries:
        return Retries(policy, jitter=random.Random(0), on_retry=self.note)

    def note(self) -> None:
        self.num_retries += 1
        self.waits()


FAST = RetryPolicy(num_retries=3, first_wait_s=0.0)


def test_a_read_that_recovers_is_counted() -> None:
    storage = Storage(unreadable(TimeoutError()) for _ in range(3))
    assert storage.retries(FAST).call(storage.read, what="bytes 0 to 9") == "content"
    assert storage.num_retries == 3


def test_a_read_that_does_not_recover_tells_what_and_how_often() -> None:
    storage = Storage(unreadable(TimeoutError()) for _ in range(4))
    with pytest.raises(UnreadableUrl, match=r"a\.tar: .*: reason \(bytes 0 to 9, 4 attempts\)"):
        storage.retries(FAST).call(storage.read, what="bytes 0 to 9")


@pytest.mark.parametrize("error", [FileNotFoundError("a.tar"), unreadable(PermissionError())])
def test_a_lasting_error_is_raised_at_once(error: Exception) -> None:
    storage = Storage(iter([error, error]))
    with pytest.raises(type(error)):
        storage.retries(FAST).call(storage.read, what="bytes 0 to 9")
    assert storage.num_retries == 0


def test_closing_ends_the_waiting() -> None:
    is_waiting = threading.Event()
    storage = Storage((unreadable(TimeoutError()) for _ in range(9)), waits=is_waiting.set)
    retries = storage.retries(RetryPolicy(first_wait_s=3600.0, longest_wait_s=3600.0))
    raised: list[UnreadableUrl] = []

    def call() -> None:
        with pytest.raises(UnreadableUrl) as caught:
            retries.call(storage.read, what="bytes 0 to 9")
        raised.append(caught.value)

    thread = threading.Thread(target=call)
    thread.start()
    assert is_waiting.wait(timeout=10)
    retries.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(raised) == 1


@given(st.integers(1, 10_000), st.integers(0, 2**32))
def test_waits_grow_up_to_a_limit_and_differ(num_attempts: int, seed: int) -> None:
    policy = RetryPolicy(first_wait_s=0.1, longest_wait_s=30.0)
    longest = min(30.0, 0.1 * 2 ** min(num_attempts - 1, 20))
    wait_s = policy.wait_s(num_attempts, random.Random(seed))
    assert longest / 2 <= wait_s <= longest
    assert wait_s != policy.wait_s(num_attempts, random.Random(seed + 1))
