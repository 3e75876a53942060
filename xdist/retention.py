"""Retention: which checkpoints of a run stay, and which are deleted.

Those stay that are among the newest, or have the best scores, or whose turn it is; and those in
whose directory somebody has put a file `pinned`. What a checkpoint scored lies beside its parts, in
`scores.json`; `best.json` in the run directory names the best one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from datapipe.storage import exists, open_filesystem, write_bytes
from xdist.checkpoint import BEST, MANIFEST, Checkpoint, checkpoint_url, directories
from xdist.config import CheckpointConfig
from xdist.errors import CheckpointDamaged, UnknownFormat
from xdist.patient_storage import fetch

SCORES = "scores.json"
PINNED = "pinned"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What counts of the scores of a checkpoint."""

    measure: str
    value: float

    @classmethod
    def of(cls, scores: Mapping[str, Mapping[str, float]]) -> Scored | None:
        """scores: by the kind of weights. That of the average counts, where there is one; of
        several measures the first.
        """
        for weights in ("average", "raw"):
            if found := scores.get(weights):
                measure = next(iter(found))
                return cls(measure, found[measure])
        return None


class Retention:
    """Of one run. To be used by one thread."""

    def __init__(self, run_dir: str, config: CheckpointConfig, *, save_every_samples: int) -> None:
        self._run_dir = run_dir
        self._config = config
        self._save_every_samples = save_every_samples
        self._numbers: dict[str, int | None] = {}
        """URL -> which one of the regular checkpoints of the run it is; None of one that is
        damaged.
        """
        self._scores: dict[str, Scored | None] = {}
        """By URL."""

    def prune(self, *, newest: int, spare: Collection[str] = ()) -> None:
        """Delete checkpoints that do not stay, none of them after step `newest` nor in `spare`
        (URLs); what was never published and is older than the newest that stay goes too.

        What comes after `newest` is none of this life's: damaged, or it would have been resumed
        from.
        """
        filesystem, _ = open_filesystem(self._run_dir)
        last = checkpoint_url(self._run_dir, newest)
        urls = [url for url in directories(self._run_dir) if url <= last]
        published = [url for url in urls if exists(f"{url}/{MANIFEST}")]
        if len(published) <= self._config.keep:
            return
        oldest = published[-self._config.keep]
        stays = {*spare, *self._best(published), *filter(self._is_regular, published)}
        for url in urls:
            _, path = open_filesystem(url)
            if url < oldest and url not in stays and not filesystem.exists(f"{path}/{PINNED}"):
                filesystem.rm(path, recursive=True)

    def _is_regular(self, url: str) -> bool:
        """Whether it is one of those of which every n-th stays."""
        if self._config.keep_every is None:
            return False
        if url not in self._numbers:
            try:
                cut = Checkpoint.open(url).manifest.cut
                self._numbers[url] = cut.num_samples // self._save_every_samples
            except (CheckpointDamaged, UnknownFormat):
                self._numbers[url] = None
        number = self._numbers[url]
        return number is not None and number > 0 and number % self._config.keep_every == 0

    def _best(self, published: Collection[str]) -> list[str]:
        """The best first."""
        scored = [(url, score) for url in published if (score := self._score(url)) is not None]
        ordered = sorted(scored, key=lambda each: -each[1].value)
        return [url for url, _ in ordered[: self._config.keep_best]]

    def _score(self, url: str) -> Scored | None:
        if url not in self._scores:
            self._scores[url] = Scored.of(read_scores(url))
        return self._scores[url]

    def scored(self, url: str, weights: str, scores: Mapping[str, float]) -> None:
        """Write down what a checkpoint has scored, and which one is the best by now."""
        known = {**read_scores(url), weights: dict(scores)}
        write_bytes(f"{url}/{SCORES}", json.dumps(known, indent=1).encode())
        self._scores[url] = Scored.of(known)
        everything = [each for each in directories(self._run_dir) if exists(f"{each}/{MANIFEST}")]
        for best in self._best(everything)[:1]:
            score = self._score(best)
            assert score is not None
            name = best.rsplit("/", 1)[-1]
            told = {"checkpoint": name, "measure": score.measure, "score": score.value}
            write_bytes(f"{self._run_dir}/{BEST}", json.dumps(told, indent=1).encode())


def read_scores(url: str) -> dict[str, dict[str, float]]:
    """What the checkpoint at `url` has scored, by the kind of weights and the measure; nothing
    where that is not known.
    """
    try:
        value = json.loads(fetch(f"{url}/{SCORES}"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
