"""The training set of a run: one data set, or several mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    fingerprint: str
    """Of the samples of all sources."""

    def open_index(self) -> ShardIndex:
        """The samples of all sources, numbered one source after the other."""
        return _joined([ShardIndex.open(url) for url in self.index_urls])


class Sources:
    """The data sets that a run trains on, opened once."""

    def __init__(self, config: TrainConfig, *, run_dir: str) -> None:
        """Shards without an index get one in `run_dir`. Raises `DataError`."""
        self._config = config
        self._urls = config.data.sources
        names = ["train", *(f"train-{number}" for number in range(1, len(self._urls)))]
        self._index_urls = tuple(
            ensure_index(url, index_directory=f"{run_dir}/index/{name}")
            for url, name in zip(self._urls, names, strict=True)
        )
        self._indexes = [ShardIndex.open(url) for url in self._index_urls]
        self._labels = [labels_at(url) for url in self._urls]

    def check(self) -> TrainingData:
        """See that the shards are there and that labels agree. Raises `DataError`, `UserError`."""
        for index in self._indexes:
            index.check_shards()
        for url, labels in zip(self._urls[1:], self._labels[1:], strict=True):
            check_same_labels(self._labels[0], self._urls[0], url, labels)
        labels = max(self._labels, key=len)
        return TrainingData(
            self._index_urls,
            self._order(),
            labels,
            max(len(labels), *(index.num_labels for index in self._indexes)),
            _joined(self._indexes).fingerprint(),
        )

    def label_frequencies(self) -> list[float]:
        """The share of what is trained on that carries each label: as labels.json says, else
        counted. Raises `DataError`.
        """
        of_sources = [
            [label.weight for label in labels] or index.label_frequencies().tolist()
            for labels, index in zip(self._labels, self._indexes, strict=True)
        ]
        if len(of_sources) == 1:
            return of_sources[0]
        total = np.zeros(max(map(len, of_sources)))
        for frequencies, share in zip(of_sources, self._shares(), strict=True):
            total[: len(frequencies)] += np.array(frequencies) * (share / TOTAL_SHARE)
        return list(total.tolist())

    def _sizes(self) -> tuple[int, ...]:
        return tuple(index.num_samples for index in self._indexes)

    def _shares(self) -> tuple[int, ...]:
        return shares_of(self._sizes(), self._config.data.mix_weights)

    def _order(self) -> Order:
        data, seed, sizes = self._config.data, self._config.seed, self._sizes()
        if len(sizes) == 1:
            return SampleOrder(sizes[0], data.block_size, data.blocks_per_pool, seed)
        return MixedOrder(sizes, self._shares(), data.block_size, data.blocks_per_pool, seed)


def _joined(indexes: Sequence[ShardIndex]) -> ShardIndex:
    return indexes[0] if len(indexes) == 1 else joined_index(indexes)


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
