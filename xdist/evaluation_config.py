"""EvaluationConfig: how a run's weights are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from datapipe.checks import check_least, check_types

MeasureName = Literal["top_k", "map", "map_image_wise"]


@dataclass(frozen=True)
class EvaluationConfig:
    """How the evaluation shards are scored."""

    measures: tuple[MeasureName, ...] = ()
    """top_k: top-1 and top-5; map: weighted MAP@100 of the classes; map_image_wise: of the images.
    None of them is top_k for softmax, map for sigmoid.
    """
    class_weights: str | None = None
    """File of the labels that are scored and their weights: CSV (label,weight), JSON
    ({label: weight}) or a labels.json; None scores all, weighted by the training labels'
    frequencies.
    """
    skip: str | None = None
    """File of samples that do not count, one a line: a key, or a number of an ILSVRC2012 validation
    image (the blacklist).
    """
    batch_size: int = 64
    """Samples that are scored together; with other batches the last bits of a score may differ."""
    num_cpus: float = 0.0
    """CPUs that scoring asks the cluster for during a run, beside its workers, and computes with.
    0: none, it has the threads of a worker, on the driver's node. The last checkpoint is scored on
    what the workers had.
    """
    num_gpus: int = 0
    """GPUs that scoring asks for during a run, beside those of the workers."""

    def __post_init__(self) -> None:
        check_types(self, "evaluation.")
        check_least(self, "evaluation.", batch_size=1, num_cpus=0, num_gpus=0)
