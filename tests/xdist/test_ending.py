"""What a run ends with, and when."""

from __future__ import annotations

import os
import signal

import pytest

from xdist.ending import GRACE_S, Ending
from xdist.errors import RunFailed
from xdist.interruption import Interruption


def tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ends(ending: Ending, *, saved: int) -> BaseException:
    with pytest.raises((KeyboardInterrupt, RunFailed)) as caught:
        ending.check(saved=saved, newest=7)
    return caught.value


def test_a_run_ends_once_its_last_step_is_saved() -> None:
    interruption = Interruption()
    ending = Ending(interruption, may_take_s=100.0)
    assert not ending.is_due
    assert ending.left_s is None
    with interruption.heard(), interruption.waits():
        tell()
    assert ending.is_due
    assert ending.begin()
    assert not ending.begin()
    ending.check(saved=5, newest=7)
    ending.saves_at = 7
    ending.check(saved=5, newest=7)
    assert isinstance(ends(ending, saved=7), KeyboardInterrupt)
    assert ending.left_s is not None
    assert GRACE_S < ending.left_s <= 100.0


@pytest.mark.parametrize("is_told_first", [True, False])
def test_what_came_first_ends_it(is_told_first: bool, caplog: pytest.LogCaptureFixture) -> None:
    interruption, failure = Interruption(), RunFailed("too many faults\nof these")
    ending = Ending(interruption, may_take_s=0.0)
    with interruption.heard(), interruption.waits():
        for is_signal in (is_told_first, not is_told_first):
            if is_signal:
                tell()
            else:
                ending.fail(failure)
    assert not ending.begin()
    error = ends(ending, saved=5)
    assert isinstance(error, KeyboardInterrupt) if is_told_first else error is failure
    assert "cannot go on: too many faults" in caplog.text
    assert "ends before all is saved step=5 updates_lost=2" in caplog.text


def test_a_second_signal_and_one_that_nobody_waits_for_end_it_at_once() -> None:
    interruption = Interruption()
    ending = Ending(interruption, may_take_s=100.0)
    with interruption.heard():
        with interruption.waits():
            tell()
            ending.begin()
            assert not interruption.is_at_once
            with pytest.raises(KeyboardInterrupt):
                tell()
        assert ending.left_s == 0.0
        assert isinstance(ends(ending, saved=5), KeyboardInterrupt)
    alone = Interruption()
    with alone.heard(), alone.waits(), alone.waits(can_wait=False):
        with pytest.raises(KeyboardInterrupt):
            tell()
        assert not alone.is_asked


def test_a_ctrl_c_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption().heard():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
