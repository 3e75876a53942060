"""A process is told from one that is gone, and from one that got its id."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace

from xdist.liveness import Process


def test_a_process_lives_until_it_is_killed_also_while_it_is_stopped() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        process = Process.find(child.pid)
        assert process is not None
        child.send_signal(signal.SIGSTOP)
        assert process.is_alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.is_alive, "nobody has waited for it, and yet it is gone"
        child.wait()
        assert not process.is_alive
        assert Process.find(child.pid) is None


def test_a_later_process_of_the_same_id_is_another_one() -> None:
    this = Process.find(os.getpid())
    assert this is not None
    assert this.is_alive
    assert not replace(this, start_ticks=this.start_ticks - 1).is_alive
