"""The training set of a run: one data set, or several mixed by weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datapipe.index import ShardIndex, ensure_index
from datapipe.labels import LABELS_NAME, Label
from datapipe.mixing import TOTAL_SHARE, MixedOrder, joined_index, shares_of
from datapipe.order import Order, SampleOrder
from xdist.config import TrainConfig
from xdist.errors import UserError
from xdist.label_space import labels_at


@dataclass(frozen=True)
class TrainingData:
    """Where the samples are, in which order they come, and what their labels mean."""

    index_urls: tuple[str, ...]
    """The manifest of each source."""
    order: Order
    labels: tuple[Label, ...]
    """Of the source with the most; none where no source has a labels.json."""
    num_labels: int
    """Named, or met in the index."""

    def open_index(self) -> ShardIndex:
        """The samples of all sources, numbered one source after the other."""
        return open_index(self.index_urls)

    @property
    def order_facts(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed, as JSON holds it."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self.order)))  # type: ignore[call-overload]
        return {name: value for name, value in facts.items() if name != "shuffle"}


def find_training_data(config: TrainConfig, *, run_dir: str) -> TrainingData:
    """Open the sources, check that their shards are there and that their labels agree.

    Shards without an index get one in `run_dir`. Raises `DataError`, `UserError`.
    """
    data, urls = config.data, config.data.sources
    index_urls = index_sources(urls, run_dir=run_dir)
    indexes = [ShardIndex.open(url) for url in index_urls]
    for index in indexes:
        index.check_shards()
    labels_of_sources = [labels_at(url) for url in urls]
    for url, labels in zip(urls[1:], labels_of_sources[1:], strict=True):
        check_same_labels(labels_of_sources[0], urls[0], url, labels)
    labels = max(labels_of_sources, key=len)
    sizes = [index.num_samples for index in indexes]
    order: Order = SampleOrder(sizes[0], data.block_size, data.blocks_per_pool, config.seed)
    if len(urls) > 1:
        shares = shares_of(sizes, data.mix_weights)
        order = MixedOrder(tuple(sizes), shares, data.block_size, data.blocks_per_pool, config.seed)
    num_labels = max(len(labels), *(index.num_labels for index in indexes))
    return TrainingData(index_urls, order, labels, num_labels)


def index_sources(urls: Sequence[str], *, run_dir: str) -> tuple[str, ...]:
    """The manifest of each source; those without an index get one below `run_dir`."""
    names = ["train", *(f"train-{number}" for number in range(1, len(urls)))]
    return tuple(
        ensure_index(url, index_directory=f"{run_dir}/index/{name}")
        for url, name in zip(urls, names, strict=True)
    )


def open_index(index_urls: Sequence[str]) -> ShardIndex:
    """One index of all sources."""
    indexes = [ShardIndex.open(url) for url in index_urls]
    return indexes[0] if len(indexes) == 1 else joined_index(indexes)


def label_frequencies(config: TrainConfig, *, run_dir: str) -> list[float]:
    """The share of what is trained on that carries each label: as labels.json says, else counted.

    Raises `DataError`.
    """
    urls = config.data.sources
    named = [[label.weight for label in labels_at(url)] for url in urls]
    if len(urls) == 1 and named[0]:
        return named[0]
    indexes = [ShardIndex.open(url) for url in index_sources(urls, run_dir=run_dir)]
    shares = shares_of([index.num_samples for index in indexes], config.data.mix_weights)
    of_sources = [
        weights or index.label_frequencies().tolist()
        for weights, index in zip(named, indexes, strict=True)
    ]
    total = np.zeros(max(map(len, of_sources)))
    for frequencies, share in zip(of_sources, shares, strict=True):
        total[: len(frequencies)] += np.array(frequencies) * (share / TOTAL_SHARE)
    return list(total.tolist())


def check_same_labels(
    labels: Sequence[Label], source: str, other_source: str, others: Sequence[Label]
) -> None:
    """Where both sets have a labels.json, an id must mean the same in both (`UserError`)."""
    for one, other in zip(labels, others, strict=False):
        if one.name != other.name:
            raise UserError(
                f"label {one.id} is {one.name!r} in {source}, {other.name!r} in {other_source}; "
                f"pack {other_source} with --labels {source}/{LABELS_NAME}"
            )
