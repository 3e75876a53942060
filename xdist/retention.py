"""Retention: which checkpoints of a run stay, and which are deleted.

Those stay that are among the newest, or have the best scores, or whose turn it is; and those in
whose directory somebody has put a file `pinned`. What a checkpoint scored lies beside its parts, in
`scores.json`; `best.json` in the run directory names the best one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from datapipe.errors import UnreadableUrl
from datapipe.json_text import parse_json
from datapipe.storage import names_in, remove, remove_directory, write_bytes
from xdist.checkpoint import (
    BEST,
    MANIFEST,
    Checkpoint,
    checkpoint_url,
    directories,
    is_due,
    step_of,
)
from xdist.config import CheckpointConfig
from xdist.errors import CheckpointDamaged, UnknownFormat, UserError
from xdist.patient_storage import fetch

logger = logging.getLogger(__name__)

SCORES = "scores.json"
PINNED = "pinned"


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
    """Of one run. To be used by one thread. Errors: `OSError` and `UnreadableUrl`."""

    def __init__(self, run_dir: str, config: CheckpointConfig, *, save_every_samples: int) -> None:
        self._run_dir = run_dir
        self._config = config
        self._save_every_samples = save_every_samples
        self._scores: dict[str, Scored | None] = {}
        """By URL."""
        self._nums_samples: dict[str, int] = {}
        """By URL."""
        self._measure: str | None = None
        """Of the last scores: those of others are not compared with them."""

    def prune(self, *, newest: int, spare: Collection[str] = ()) -> None:
        """Delete checkpoints that do not stay, none of them after step `newest` nor in `spare`
        (URLs); what was never published goes too, when two later ones are there. Where it is the
        turn of the newest one to stay for good, it is pinned.

        What comes after `newest` is none of this life's: damaged, or it would have been resumed
        from.
        """
        last = checkpoint_url(self._run_dir, newest)
        names = {url: names_in(url) for url in directories(self._run_dir) if url <= last}
        published = [url for url in names if MANIFEST in names[url]]
        for url in self._regular(published):
            if PINNED not in names[url]:
                write_bytes(f"{url}/{PINNED}", self._why_pinned.encode())
                names[url].add(PINNED)
        stays = {*spare, *published[-self._config.keep :]}
        if not stays.issuperset(published):
            stays |= {*self._ranked(published)[: self._config.keep_best]}
        overtaken_by = published[-2] if len(published) > 1 else ""
        for url in names:
            is_old = MANIFEST in names[url] or url < overtaken_by
            if is_old and url not in stays and PINNED not in names[url]:
                _delete(url)

    @property
    def _why_pinned(self) -> str:
        return f"checkpoint.keep_every is {self._config.keep_every}\n"

    def _regular(self, published: Sequence[str]) -> list[str]:
        """Those of the newest ones that are the first after a multiple of what `keep_every`
        checkpoints have.
        """
        if self._config.keep_every is None:
            return []
        every = self._config.keep_every * self._save_every_samples
        looked_at = ["", *published][-self._config.keep - 2 :]
        return [
            after
            for before, after in pairwise(looked_at)
            if is_due(self._num_samples(before), self._num_samples(after), every=every)
        ]

    def _num_samples(self, url: str) -> int:
        """Of the checkpoint there; 0 where there is none."""
        if url not in self._nums_samples:
            try:
                opened = Checkpoint.open(url) if url else None
            except (CheckpointDamaged, UnknownFormat):
                opened = None
            self._nums_samples[url] = opened.manifest.cut.num_samples if opened else 0
        return self._nums_samples[url]

    def _ranked(self, published: Collection[str]) -> list[str]:
        """The best first."""
        scored = [(url, score) for url in published if (score := self._score(url)) is not None]
        measure = self._measure or (scored[-1][1].measure if scored else "")
        comparable = [each for each in scored if each[1].measure == measure]
        ordered = sorted(comparable, key=lambda each: -each[1].value)
        return [url for url, _ in ordered]

    def _score(self, url: str) -> Scored | None:
        if url not in self._scores:
            self._scores[url] = Scored.of(read_scores(url))
        return self._scores[url]

    def scored(self, url: str, weights: str, scores: Mapping[str, float]) -> None:
        """Write down what a checkpoint has scored, and which one is the best by now."""
        known = {**read_scores(url), weights: dict(scores)}
        write_bytes(f"{url}/{SCORES}", json.dumps(known, indent=1).encode())
        score = self._scores[url] = Scored.of(known)
        self._measure = score.measure if score is not None else self._measure
        published = [each for each in directories(self._run_dir) if MANIFEST in names_in(each)]
        for best in self._ranked(published)[:1]:
            score = self._score(best)
            assert score is not None
            name = best.rsplit("/", 1)[-1]
            told = {"checkpoint": name, "measure": score.measure, "score": score.value}
            write_bytes(f"{self._run_dir}/{BEST}", json.dumps(told, indent=1).encode())


def _delete(url: str) -> None:
    """The manifest first, so that nothing is a checkpoint of which a part lacks; not one that has
    been pinned meanwhile. One that cannot be deleted keeps no other there.
    """
    try:
        names = names_in(url)
        if PINNED in names:
            return
        if MANIFEST in names:
            remove(f"{url}/{MANIFEST}")
        remove_directory(url)
    except (OSError, UnreadableUrl) as error:
        logger.warning("checkpoint not deleted: %s", error)


def read_scores(url: str) -> dict[str, dict[str, float]]:
    """What the checkpoint at `url` has scored, by the kind of weights and the measure; nothing
    where that is not known.
    """
    try:
        value = parse_json(fetch(f"{url}/{SCORES}"))
        return {
            weights: {name: float(score) for name, score in scores.items()}
            for weights, scores in value.items()
        }
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def pin(run_dir: str, step: int) -> None:
    """Keep the checkpoint of this step for good. Raises `UserError` where there is none."""
    write_bytes(f"{_at(run_dir, step)}/{PINNED}", b"by hand\n")


def unpin(run_dir: str, step: int) -> None:
    """Leave it to the settings of the run. Raises `UserError` where there is none."""
    url = _at(run_dir, step)
    if PINNED in names_in(url):
        remove(f"{url}/{PINNED}")


def _at(run_dir: str, step: int) -> str:
    url, urls = checkpoint_url(run_dir, step), directories(run_dir)
    if url not in urls:
        steps = ", ".join(str(step_of(each)) for each in urls)
        raise UserError(f"{run_dir} has no checkpoint of step {step}; it has: {steps or 'none'}")
    return url
