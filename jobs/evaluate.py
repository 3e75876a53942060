"""Score a checkpoint: top-1 and top-5, or weighted MAP@100.

python jobs/evaluate.py ~/xdist-runs/imagenet_sync-1a2b3c4d
python jobs/evaluate.py runs/jft/checkpoints/step-000000001000 --data fasteval14k \\
    --class-weights weights.csv --weights both --num-workers 8
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import tyro
from rich.console import Console

from datapipe.errors import DataError
from datapipe.index import ShardIndex, ensure_index
from datapipe.labels import Label, read_labels
from datapipe.storage import absolute, join, remove, write_bytes
from xdist import checkpoint
from xdist.checkpoint import Checkpoint
from xdist.config import TrainConfig
from xdist.connection import connect
from xdist.errors import UserError
from xdist.evaluation_config import MeasureName
from xdist.label_space import labels_at
from xdist.score_report import ScoreReport
from xdist.scoring import ScoringPlan, measures, plan_scoring
from xdist.sharded_scoring import count_workers, score_sharded
from xdist.state import WeightsName, averages
from xdist.stored_config import stored_config
from xdist.topologies import nodes
from xdist.training_data import Sources

DESCRIPTION = "Score a checkpoint: top-1 and top-5, or weighted MAP@100."


@dataclass(frozen=True)
class Arguments:
    """The command line. What is not given is as the run has it."""

    source: tyro.conf.Positional[str]
    """A run directory, whose newest checkpoint that verifies is taken, or one checkpoint; a path or
    a URL."""
    data: str | None = None
    """Directory or URL of the evaluation shards."""
    weights: Literal["average", "raw", "both"] | None = None
    """The Polyak average, the raw weights, or one after the other; None is the average where the
    run keeps one, else raw."""
    measure: tuple[MeasureName, ...] = ()
    """top_k: top-1 and top-5; map: weighted MAP@100 of the classes; map_image_wise: of the
    images."""
    class_weights: str | None = None
    """File of the labels that are scored and their weights: CSV (label,weight), JSON
    ({label: weight}) or a labels.json."""
    skip: str | None = None
    """File of samples that do not count, one a line: a key, or a number of an ILSVRC2012 validation
    image (the blacklist)."""
    labels: str | None = None
    """labels.json of the training set; None is the one beside its shards."""
    num_workers: int | Literal["auto"] = "auto"
    """Parts that are scored side by side; auto is as many as the cluster has room for."""
    cpus_per_worker: float | None = None
    """CPUs a worker reserves; it computes with that many threads."""
    gpus_per_worker: int | Literal["auto"] | None = None
    """GPUs a worker reserves; auto is 1 where the cluster has GPUs, else 0."""
    output: str | None = None
    """Directory or URL for evaluation.json and the CSV files; None is the run directory."""

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, int) and self.num_workers < 1:
            raise ValueError(f"--num-workers is {self.num_workers}; allowed: at least 1")


def run(arguments: Arguments) -> tuple[ScoreReport, list[str]]:
    """Evaluate; the report, and the files that it was written to."""
    scored, run_dir = checkpoint.find(absolute(arguments.source))
    output = absolute(arguments.output) if arguments.output else run_dir
    if output is None:
        raise UserError(f"{scored.url} lies in no run directory; give --output a directory")
    config = configured(stored_config(scored), arguments)
    check_writable(output)
    connect(config.cluster)
    cluster, num_workers = count_workers(
        config.cluster, nodes.resources(), num_workers=arguments.num_workers
    )
    config = replace(config, cluster=cluster)
    given = read_labels(arguments.labels) if arguments.labels else ()
    labels = given or labels_at(config.data.train)
    weighted = labels if given or not config.data.mix else ()
    known = frequencies(config, weighted, run_dir or output)
    plan = plan_of(config, scored, labels, known, output=output)
    tallies = {
        weights: score_sharded(plan, scored.url, weights, num_workers=num_workers)
        for weights in kinds(config, arguments)
    }
    report = ScoreReport.of(scored, plan, labels, tallies)
    return report, report.write(output)


def check_writable(output: str) -> None:
    """Raise `UserError` before anything is computed that could not be stored."""
    probe = join(output, ".evaluation-probe")
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written: {error}; give --output another directory"
        ) from error


def configured(config: TrainConfig, arguments: Arguments) -> TrainConfig:
    """The run's configuration with what the command line says of its evaluation."""
    data = absolute(arguments.data) if arguments.data else config.data.evaluation
    if data is None:
        raise UserError("the run has no data.evaluation; give --data the evaluation shards")
    evaluation = {
        "measures": arguments.measure or None,
        "class_weights": arguments.class_weights,
        "skip": arguments.skip,
    }
    cluster = {
        "cpus_per_worker": arguments.cpus_per_worker,
        "gpus_per_worker": arguments.gpus_per_worker,
    }
    try:
        return replace(
            config,
            data=replace(config.data, evaluation=data),
            evaluation=replace(config.evaluation, **_given(evaluation)),
            cluster=replace(config.cluster, **_given(cluster)),
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def kinds(config: TrainConfig, arguments: Arguments) -> Sequence[WeightsName]:
    """The kinds of weights that are scored."""
    if arguments.weights == "both":
        return ("average", "raw")
    if arguments.weights is not None:
        return (arguments.weights,)
    return ("average",) if averages(config.optimizer) else ("raw",)


def plan_of(
    config: TrainConfig,
    scored: Checkpoint,
    labels: Sequence[Label],
    frequencies: Sequence[float] | None,
    *,
    output: str,
) -> ScoringPlan:
    """What is scored. An evaluation set without an index gets one in `output`."""
    assert config.data.evaluation is not None
    index_url = ensure_index(config.data.evaluation, index_directory=f"{output}/evaluation-index")
    ShardIndex.open(index_url).check_shards()
    return plan_scoring(
        config,
        index_url=index_url,
        num_classes=scored.manifest.layout.parameters[-1].shape[0],  # The classifier's bias.
        labels=labels,
        frequencies=frequencies,
    )


def frequencies(
    config: TrainConfig, labels: Sequence[Label], run_dir: str
) -> Sequence[float] | None:
    """The training labels', by id; None where nothing needs them that does not have them.

    labels: whose weights are those frequencies, where there are such.
    """
    if labels:
        return [label.weight for label in labels]
    if config.evaluation.class_weights or measures(config) == ("top_k",):
        return None
    try:
        return Sources(config, run_dir=run_dir).label_frequencies()
    except DataError as error:
        raise UserError(
            f"MAP weights a class by its training frequency, and {error}; "
            "give --class-weights or --labels"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 with one line on stderr for what the user can mend."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        report, files = run(tyro.cli(Arguments, args=arguments, description=DESCRIPTION))
    except (DataError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(report.summary())
    Console().print(report.table())
    print("written:", *files, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
