"""Starting the systems of bench-sync: one command each, for both of Ray on a head of its own.

The head is there, and at rest, before the command is given, as a cluster is before a job, and ends
after it: an idle one takes some of the cores from who comes next. (Its agents start for three more
seconds when it answers already. Who connects at once waits for them; who first imports, does not.)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from local_head import LocalHead

from tests.benchmarks.peers.data_sets import ROOT
from tests.benchmarks.sync_log import Timeline
from tests.benchmarks.sync_request import NUM_WORKERS, Request

MAX_RESTARTS = 3
RUN_LIMIT_S = 300
REST_LIMIT_S = 30.0
AT_REST = 0.1
"""Of all cores' time, for a second."""
TAIL_LINES = 15


class RunFailed(Exception):
    """A run did not end as it should; the text says why, with the end of its output."""


@dataclass(frozen=True)
class System:
    """How one system is started."""

    name: str
    needs_ray: bool
    packages: str | None = None
    """Directory of packages that it imports besides those of this environment."""

    def command(self, request: Request) -> list[str]:
        arguments = ["-m", f"tests.benchmarks.sync_{self.name}", request.to_json()]
        if self.name != "torchrun":
            return [sys.executable, *arguments]
        return [
            str(Path(sys.executable).with_name("torchrun")),
            "--standalone",
            f"--nproc-per-node={NUM_WORKERS}",
            f"--max-restarts={MAX_RESTARTS}",
            *arguments,
        ]

    def variables(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "jobs"), *filter(None, [self.packages])]
        return {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": ":".join(paths),
            # Without it, a restarted gloo group reads the addresses of the one before: it fails a
            # few times, or hangs (pytorch/pytorch#135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }


def run(system: System, request: Request, *, num_cpus: int) -> Timeline:
    """Run it to its end, on a machine that is said to have so many CPUs.

    Raises `RunFailed`.
    """
    with _environment(system, num_cpus) as environment:
        output = Path(f"{request.log}.output")
        launched = time.time()
        with output.open("w") as file:
            process = subprocess.Popen(
                system.command(request),
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            code = _code_of(process)
    if code:
        lines = output.read_text(errors="replace").splitlines()
        tail = "\n".join(lines[-TAIL_LINES:])
        raise RunFailed(f"{system.name} ended with {code}:\n{tail}")
    try:
        return Timeline.read(Path(request.log), launched=launched, world_size=NUM_WORKERS)
    except (OSError, ValueError) as error:
        raise RunFailed(f"{system.name}: {error}") from error


def _code_of(process: subprocess.Popen[bytes]) -> int | str:
    try:
        return process.wait(RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no end within {RUN_LIMIT_S} s"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _environment(system: System, num_cpus: int) -> Iterator[Mapping[str, str]]:
    """What the command sees, while its cluster is there."""
    variables = system.variables()
    if system.needs_ray:
        with LocalHead(num_cpus=num_cpus, variables=variables) as head:
            _wait_until_at_rest()
            yield head.environment
    else:
        _wait_until_at_rest()
        yield {**os.environ, **variables}


def _wait_until_at_rest() -> None:
    """Wait until this machine has little to do. Raises `RunFailed`."""
    deadline = time.monotonic() + REST_LIMIT_S
    last = _processor_times()
    while time.monotonic() < deadline:
        time.sleep(1)  # This second is what is measured.
        now = _processor_times()
        used, passed = (after - before for before, after in zip(last, now, strict=True))
        if used <= AT_REST * passed:
            return
        last = now
    raise RunFailed(
        f"this machine does not come to rest within {REST_LIMIT_S:g} s; end what else runs on it"
    )


def _processor_times() -> tuple[int, int]:
    """What all cores have done, and could have, in ticks (proc_stat(5))."""
    with Path("/proc/stat").open() as file:
        user, nice, system, idle, io_wait, *others = map(int, file.readline().split()[1:9])
    used = user + nice + system + sum(others)
    return used, used + idle + io_wait
