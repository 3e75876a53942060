"""The demo: synthetic scenes, a Ray head of its own, and a real `ray job submit` of the
asynchronous job.

Its last line is one JSON object: run_dir, map100, map100_prevalence, seconds. The head is ended in
the end, also after Ctrl-C or a failure.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import FrameType

import built_in
from local_head import HeadFailed, LocalHead

ROOT = Path(__file__).resolve().parent.parent
NUM_WORKERS = 2
NUM_SERVERS = 2


def main() -> int:
    """Run the demo; 0 when it trained, saved and scored."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    started = time.monotonic()
    run_dir = ROOT / "runs" / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        print("drawing the synthetic scenes (once)", flush=True)
        built_in.make_scenes()
        print("starting a Ray head on loopback", flush=True)
        with LocalHead(num_cpus=NUM_WORKERS) as head:
            code = subprocess.call(_submission(head, run_dir), env=head.environment, cwd=ROOT)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the Ray head is ended, the run so far is in {run_dir}")
        return 130
    except HeadFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if code != 0:
        print(f"error: the job failed (code {code}); its log is above", file=sys.stderr)
        return 1
    _report(run_dir, seconds=time.monotonic() - started)
    return 0


def _submission(head: LocalHead, run_dir: Path) -> list[str]:
    submit = [str(Path(sys.executable).with_name("ray")), "job", "submit"]
    where = ["--address", head.jobs_address, "--working-dir", str(ROOT)]
    job = ["python", "jobs/jft_async.py", "--preset", "demo", "--run-dir", str(run_dir)]
    sizes = ["--num-workers", str(NUM_WORKERS), "--num-servers", str(NUM_SERVERS)]
    return [*submit, *where, "--", *job, *sizes]


def _report(run_dir: Path, *, seconds: float) -> None:
    scores = json.loads((run_dir / "summary.json").read_text())["scores"]["average"]
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
