"""Invocation: what the command line of a job says.

`--preset NAME` or `--config FILE` picks a complete configuration, any other option overrides one
field of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NoReturn

import tyro

from datapipe.errors import DataError
from datapipe.json_text import parse_json
from datapipe.storage import absolute, exists, join, read_bytes
from xdist.config import TrainConfig
from xdist.model_config import MODEL_NAMES
from xdist.plain_config import from_json
from xdist.run_directory import CONFIG

Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True)
class Invocation:
    """One call of a job."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""
    preset: str
    """Where the values below come from, unless they are given."""
    config: str | None = None
    """The same, from the config.json of a run, or its run directory, in the place of a preset; but
    for its run_dir.
    """
    resume: str | None = None
    """A checkpoint, a run directory (its newest one) or RUN/best (the best one), path or URL, that
    the run begins with where it has none of its own yet. It must be of the same network and
    training set.
    """
    no_resume: Flag = False
    """Start over, in a new run directory beside that of the same command. To go on with it later,
    give that as --run-dir.
    """
    dry_run: Flag = False
    """Build everything, on the cluster that the run would have, make a few steps, say how long the
    run and how large its workers would be, and leave nothing behind, but the built-in data set.
    """
    print_config: Flag = False
    """Write the configuration to stdout, as --config takes it, and do nothing else."""


def parse(
    presets: Mapping[str, TrainConfig],
    *,
    default: str,
    description: str,
    arguments: Sequence[str] | None,
) -> Invocation:
    """What a command line says. Leaves the program with code 2 and one message when it cannot
    be.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    picker = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    picker.add_argument("--preset", choices=sorted(presets), default=None)
    picker.add_argument("--config", default=None)
    picker.add_argument("--model.name", choices=MODEL_NAMES, default=None, dest="network")
    picked, _ = picker.parse_known_args(arguments)
    if picked.preset is not None and picked.config is not None:
        _refuse("--preset and --config both pick all values; give one of them")
    name = picked.preset or default
    base = presets[name] if picked.config is None else _read(picked.config)
    if picked.network is not None:
        base = replace(base, model=base.model.of_network(picked.network))
    names = ", ".join(sorted(presets))
    try:
        return tyro.cli(
            Invocation,
            default=Invocation(base, preset=name, config=picked.config),
            args=arguments,
            description=f"{description}\n\n--preset picks the values below: {names} (now {name}).",
        )
    except ValueError as error:  # Of fields that do not go together.
        _refuse(str(error))


def _read(source: str) -> TrainConfig:
    """The configuration in a file, or of a run directory."""
    try:
        url = absolute(source)
        in_run = join(url, CONFIG)
        text = read_bytes(in_run if exists(in_run) else url)
        config = from_json(TrainConfig, parse_json(text))
    except FileNotFoundError:
        _refuse(f"--config {source}: neither a file nor a run directory with a {CONFIG}")
    except (OSError, DataError, ValueError) as error:
        _refuse(f"--config {source} is not the configuration of a run: {error}")
    return replace(config, run_dir=None)


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
