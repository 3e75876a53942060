"""Starting the parts of bench-async: one process each, on a cluster that is there already.

A part is a module here, which gets its request as JSON, its only argument, and ends with its result
as JSON, in the last line of its output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tests.benchmarks.peers.data_sets import ROOT

TAIL_LINES = 15
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'jobs'}"}
"""Of the clusters: every process has one thread for torch, as Ray gives an actor of one CPU."""


class PartFailed(Exception):
    """A part did not end as it should; the text says why, with the end of its errors."""


def result_of(
    part: str, request: Any, *, environment: Mapping[str, str], limit_s: float
) -> dict[str, Any]:
    """What a part says, given a dataclass of plain values. Raises `PartFailed`."""
    arguments = [json.dumps(asdict(request))]
    return last_line_of(f"async_{part}", arguments, environment=environment, limit_s=limit_s)


def last_line_of(
    module: str, arguments: list[str], *, environment: Mapping[str, str], limit_s: float
) -> dict[str, Any]:
    """The JSON that a module of the benchmarks ends with. Raises `PartFailed`."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments],
            cwd=ROOT,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PartFailed(f"{module}: no end within {limit_s:g} s") from error
    if done.returncode != 0:
        tail = "\n".join(done.stderr.splitlines()[-TAIL_LINES:])
        raise PartFailed(f"{module} ended with {done.returncode}:\n{tail}")
    try:
        # Ray writes of processes that were killed, also when the result is there already.
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        result: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise PartFailed(f"{module}: it ends without a JSON object") from error
    return result
