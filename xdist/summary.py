"""Summary: how a run ended, as summary.json has it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Of one process; a run that was resumed had others before."""

    run_dir: str
    step: int
    num_samples: int
    seconds: float
    scores: dict[str, dict[str, float]]
    """Weights (average, raw) -> measure -> score of the last checkpoint."""
