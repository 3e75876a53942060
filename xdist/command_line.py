"""The command line of the jobs: run directory, logging, exit codes.

Exit codes: 0 done, 2 something the user can mend, 1 anything else, 130 interrupted, 143 terminated;
all but 0 leave a run that the same command resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from datapipe.errors import DataError
from datapipe.storage import absolute, exists, remove_directory
from xdist.config import TrainConfig
from xdist.connection import connect
from xdist.errors import RunFailed, UserError
from xdist.interruption import Interruption
from xdist.invocation import parse
from xdist.run_directory import CONFIG, RunDirectory, identity
from xdist.summary import Summary

logger = logging.getLogger(__name__)

RUNS = "~/xdist-runs"
SUMMARY = "summary.json"
WORKING_COPIES = "working_dir_files"
"""The directory of Ray's session below which the working directories of jobs are unpacked."""
FORMAT = "%(asctime)s %(levelname)s %(message)s"


def _nothing() -> None:
    """Leave the other nodes as they are."""


def main(
    job: str,
    presets: Mapping[str, TrainConfig],
    *,
    default: str,
    description: str,
    complete: Callable[[TrainConfig], TrainConfig] = lambda config: config,
    on_other_nodes: Callable[[], object] = _nothing,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a job to the end and return its exit code.

    `complete` fills in what the parsed configuration leaves open, for instance the built-in data
    set; where it did, `on_other_nodes` is called once on each of them, to do the same there.
    """
    invocation = parse(presets, default=default, description=description, arguments=arguments)
    config = invocation.run
    if invocation.print_config:
        sys.stdout.write(json.dumps(config.to_json(), indent=1) + "\n")
        return 0
    console = Console(stderr=True)
    interruption = Interruption()
    with _logging(_console_handler(console)), ExitStack() as stack:
        try:
            stack.enter_context(interruption.heard())
            completed = complete(config)
            was_completed = completed != config
            config = _anchored(completed)
            where = _run_dir(job, config)
            where = _unused(where) if invocation.no_resume else where
            if invocation.dry_run:
                where = f"{where}-dry-run-{uuid.uuid4().hex[:8]}"
                stack.callback(_remove, where)
            run = stack.enter_context(RunDirectory(where, config))
            with run.told_of_refusals():
                log_file = LogFile(run.log)
            stack.enter_context(_logging(log_file))
            logger.info("run directory %s", run.url)
            with _exit_of_ray(interruption):
                connect(config.cluster)
            stack.enter_context(interruption.heard())  # In the place of Ray's.
            from xdist import training  # With torch, which the fork servers import meanwhile.

            go = training.rehearse if invocation.dry_run else training.train
            outcome = go(
                config,
                run,
                console=console,
                on_other_nodes=on_other_nodes if was_completed else _nothing,
                interruption=interruption,
                resume_from=invocation.resume,
            )
            if isinstance(outcome, Summary):
                _finish(run, outcome, console)
            else:
                console.print(outcome.table())
        except (DataError, UserError) as error:
            logger.error("%s", error)
            return 2
        except RunFailed as error:
            logger.error("%s", error)
            return 1
        except KeyboardInterrupt:
            logger.warning("interrupted; the same command resumes from the last checkpoint")
            return 143 if interruption.is_termination else 130
        except Exception:
            logger.exception("the run ended with an error that is a bug, or a fault nobody foresaw")
            return 1
        return 0


def _run_dir(job: str, config: TrainConfig) -> str:
    """Where the run goes. Raises `UserError` for a path inside the copy of the working directory
    that Ray makes for a job, and deletes.
    """
    where = absolute(config.run_dir or default_run_dir(job, config))
    if WORKING_COPIES in Path(where).parts:
        raise UserError(
            f"run_dir is {config.run_dir!r}, relative to the working directory of a Ray job, which "
            "Ray deletes; give --run-dir an absolute path or a URL"
        )
    return where


def _unused(where: str) -> str:
    """A run directory of this name in which there is no run yet, or the first one of `where-2` and
    so on.
    """
    names = itertools.chain([where], (f"{where}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not exists(f"{name}/{CONFIG}"))


def _remove(where: str) -> None:
    """A run directory that was only tried."""
    try:
        remove_directory(where)
    except FileNotFoundError:
        return
    except (OSError, DataError) as error:
        logger.warning("%s not removed: %s", where, error)


def default_run_dir(job: str, config: TrainConfig) -> str:
    """The run directory of this job and configuration: the same command comes back to it, also with
    other resources.
    """
    text = json.dumps(identity(config), sort_keys=True)
    return f"{RUNS}/{job}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class LogFile(logging.FileHandler):
    """Of a run. What its disk refuses is left out, and said once elsewhere."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called within the handling of an error, by those who write."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            logger.warning("%s lacks lines, which its disk refuses: %s", self.baseFilename, error)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def _console_handler(console: Console) -> logging.Handler:
    if console.is_terminal:
        return RichHandler(console=console, show_path=False, show_time=False)
    return logging.StreamHandler()


@contextmanager
def _logging(handler: logging.Handler) -> Iterator[None]:
    """What is logged inside the block goes to the handler too."""
    if not isinstance(handler, RichHandler):
        handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


@contextmanager
def _exit_of_ray(interruption: Interruption) -> Iterator[None]:
    """Inside the block Ray connects, and makes an exit of SIGTERM: it unwinds the program all the
    same. (In the 3 ms in which Ray's core starts, a handler of its own in C++ has the signal, and
    may crash: of 100 signals sent then, 2 ended the process with SIGSEGV or SIGABRT.)
    """
    try:
        yield
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        interruption.is_termination = True
        raise KeyboardInterrupt from error


def _anchored(config: TrainConfig) -> TrainConfig:
    """`config` with data paths that mean the same from every working directory."""
    data, evaluation = config.data, config.evaluation
    data = replace(
        data,
        train=absolute(data.train),
        mix=tuple(map(absolute, data.mix)),
        evaluation=_anchored_url(data.evaluation),
        cache_dir=_anchored_url(data.cache_dir),
    )
    evaluation = replace(
        evaluation,
        class_weights=_anchored_url(evaluation.class_weights),
        skip=_anchored_url(evaluation.skip),
    )
    return replace(config, data=data, evaluation=evaluation)


def _anchored_url(url: str | None) -> str | None:
    return None if url is None else absolute(url)


def _finish(run: RunDirectory, summary: Summary, console: Console) -> None:
    """Store and show the summary."""
    run.store(SUMMARY, asdict(summary))
    with run.told_of_refusals():
        run.sync()
    table = Table(title="run finished", show_header=False)
    table.add_row("updates", str(summary.step))
    table.add_row("samples", str(summary.num_samples))
    table.add_row("seconds", f"{summary.seconds:.1f}")
    for weights, scores in summary.scores.items():
        for name, value in scores.items():
            table.add_row(f"{name} ({weights} weights)", f"{value:.4f}")
    console.print(table)
    console.print(f"run directory: {summary.run_dir}", markup=False, soft_wrap=True)
