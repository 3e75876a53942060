"""The demo: synthetic scenes, a Ray head of its own, and a real `ray job submit` of the
asynchronous job. On CPUs alone.

Its last line is one JSON object: run_dir, map100, map100_prevalence, seconds. The head is ended in
the end, also after Ctrl-C or a failure. Exit codes: 0 trained, saved and scored; 2 something the
user can mend; 130 interrupted; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import FrameType

import built_in
from local_head import HeadFailed, LocalHead, ray_script

from datapipe.errors import DataError
from xdist.errors import RunFailed, UserError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("datapipe", "jobs", "xdist")
NUM_WORKERS = 2
NUM_SERVERS = 2


def main() -> int:
    """Run the demo and return its exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP.
            signal.signal(number, _interrupt)
    started = time.monotonic()
    try:
        run_dir = _train()
        _report(run_dir, seconds=time.monotonic() - started)
    except KeyboardInterrupt:
        print("interrupted; the Ray head is ended")
        return 130
    except (DataError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (HeadFailed, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train() -> Path:
    """Train and score to the end; the run directory."""
    print("drawing the synthetic scenes (once)", flush=True)
    built_in.make_scenes()
    print("starting a Ray head on loopback", flush=True)
    with LocalHead(num_cpus=NUM_WORKERS) as head:
        run_dir = _new_run_dir()
        _submit(head, run_dir)
    return run_dir


def _new_run_dir() -> Path:
    """A directory that no other demo has."""
    run_dir = ROOT / "runs" / f"demo-{datetime.now():%Y%m%d-%H%M%S-%f}"
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"the run directory cannot be made: {error}; run the demo from a clone that you can "
            "write to"
        ) from error
    return run_dir


def _submit(head: LocalHead, run_dir: Path) -> None:
    """Submit the job and follow it to its end."""
    try:
        code = subprocess.call(_submission(head, run_dir), env=head.environment)
    except KeyboardInterrupt:
        print(f"\nthe run so far is in {run_dir}", flush=True)
        raise
    if code != 0:
        raise RunFailed(f"the job failed (code {code}); its log is above, and in {run_dir}")


def _submission(head: LocalHead, run_dir: Path) -> list[str]:
    where = ["--address", head.jobs_address, "--working-dir", str(_copy_sources(head.directory))]
    job = ["python", "jobs/jft_async.py", "--preset", "demo", "--run-dir", str(run_dir)]
    sizes = ["--num-workers", str(NUM_WORKERS), "--num-servers", str(NUM_SERVERS)]
    return [ray_script(), "job", "submit", *where, "--", *job, *sizes]


def _copy_sources(directory: Path) -> Path:
    """What the job needs, apart from all else that a clone may hold: uploads are limited."""
    copy = directory / "sources"
    try:
        for name in SOURCES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    except OSError as error:
        raise UserError(
            f"the job cannot be copied to {copy}: {error}; set TMPDIR to a directory that has room"
        ) from error
    return copy


def _report(run_dir: Path, *, seconds: float) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    scores = summary["scores"].get("average")
    if scores is None:
        raise RunFailed(f"the averaged weights have no score; {run_dir / 'log.txt'} may say why")
    print(f"\ncurves: {run_dir / 'curves.png'}")
    print(
        f"weighted MAP@100 of the averaged weights: {scores['map100']:.3f}; "
        f"a constant scorer expects {scores['map100_prevalence']:.3f}"
    )
    print(json.dumps({"run_dir": str(run_dir), **scores, "seconds": round(seconds, 1)}))


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
