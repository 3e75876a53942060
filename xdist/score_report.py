"""ScoreReport: what an evaluation found, as JSON, as a table to read, and class by class as CSV.

It depends on what was scored alone, not on when, where and by how many workers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from datapipe.labels import Label
from datapipe.storage import join, write_bytes
from xdist.checkpoint import Checkpoint
from xdist.scoring import ScoringPlan, Tally, measures
from xdist.state import WeightsName

JSON_NAME = "evaluation.json"
CSV_NAME = "evaluation-{}-weights.csv"


@dataclass(frozen=True, eq=False)
class ScoreReport:
    """The scores of a checkpoint, for each kind of weights that was scored."""

    facts: dict[str, Any]
    """What was scored, on what, and what was left out."""
    scores: dict[WeightsName, dict[str, float]]
    classes: dict[WeightsName, dict[str, list[Any]]]
    """Column -> a value for each class that was scored; None where there is none."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        plan: ScoringPlan,
        labels: Sequence[Label],
        tallies: Mapping[WeightsName, Tally],
    ) -> Self:
        """`labels`: the model's, as far as they have names."""
        tally = next(iter(tallies.values()))
        return cls(
            facts=_facts(checkpoint, plan, tally),
            scores={weights: tally.scores() for weights, tally in tallies.items()},
            classes={weights: _classes(plan, labels, tally) for weights, tally in tallies.items()},
        )

    def write(self, directory: str) -> list[str]:
        """Write evaluation.json and a CSV file for each kind of weights; returns their URLs."""
        scores = {name: _without_nan(scores) for name, scores in self.scores.items()}
        text = json.dumps({**self.facts, "scores": scores}, indent=1)
        files = {JSON_NAME: text, **{CSV_NAME.format(name): self.csv(name) for name in self.scores}}
        for name, content in files.items():
            write_bytes(join(directory, name), content.encode())
        return [join(directory, name) for name in files]

    def csv(self, weights: WeightsName) -> str:
        """A line for each class that was scored."""
        columns = self.classes[weights]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue()

    def table(self) -> Table:
        """The scores, for a terminal."""
        table = Table()
        table.add_column("measure")
        for weights in self.scores:
            table.add_column(f"{weights} weights", justify="right")
        for name in next(iter(self.scores.values())):
            table.add_row(name, *(f"{scores[name]:.4f}" for scores in self.scores.values()))
        return table

    def summary(self) -> str:
        """What was scored, on what, and what was left out: three lines."""
        return (
            "{checkpoint} on {data}\n"
            "{num_images} images; {num_skipped} skipped, {num_corrupt} not decoded\n"
            "{num_outputs_scored} of {num_outputs} outputs scored; {num_labels_left_out} labels of "
            "the images are outside of these and left out; {num_without_labels} images have none "
            "left"
        ).format(**self.facts)


def _facts(checkpoint: Checkpoint, plan: ScoringPlan, tally: Tally) -> dict[str, Any]:
    evaluation = plan.config.evaluation
    has_weights = not np.isnan(plan.class_weights).any()
    return {
        "checkpoint": checkpoint.url,
        "step": checkpoint.manifest.cut.step,
        "num_samples": checkpoint.manifest.cut.num_samples,
        "data": plan.config.data.evaluation,
        "measures": list(measures(plan.config)),
        "class_weights": evaluation.class_weights
        or ("training frequencies" if has_weights else None),
        "skip": evaluation.skip,
        "num_images": tally.num_images,
        "num_skipped": tally.num_skipped,
        "num_corrupt": len(tally.corrupt),
        "num_outputs": plan.num_classes,
        "num_outputs_scored": len(plan.space.outputs),
        "num_labels_left_out": tally.num_labels_left_out,
        "num_without_labels": tally.num_without_labels,
    }


def _classes(plan: ScoringPlan, labels: Sequence[Label], tally: Tally) -> dict[str, list[Any]]:
    names = {label.id: label.name for label in labels}
    outputs = plan.space.outputs.tolist()
    return {
        "id": outputs,
        "name": [names.get(output) for output in outputs],
        "num_positives": tally.positives.tolist(),
        "weight": _values(plan.class_weights),
        **{name: _values(scores) for name, scores in tally.per_class().items()},
    }


def _values(values: NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _without_nan(scores: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in scores.items()}
