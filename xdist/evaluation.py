"""Top-k accuracy and weighted MAP@100, as accumulators that take a batch at a time.

Batches are logits with CSR labels (see `losses`); samples of weight 0 are left out. Accumulators of
the parts of a data set, merged in the order of the parts, hold what one accumulator of the whole
would hold. Scores are ranked descending; equal ones by ascending class within an image, by image
order within a class, so no result depends on a sort. A NaN ranks last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.losses import label_rows


class Measure(Protocol):
    """A score that is accumulated over batches."""

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        """Take a batch: logits (N, C), CSR labels, weights (N,); 0 leaves a sample out."""

    def merge(self, other: Self) -> None:
        """Take what `other` has taken, after one's own."""

    def compute(self) -> dict[str, float]:
        """The scores by name; NaN where no image counts."""


class TopK:
    """Share of the images that have a label among their k highest scores, for every k.

    Images without labels do not count.
    """

    def __init__(self, ks: Sequence[int] = (1, 5)) -> None:
        self.ks = tuple(ks)
        self.num_hits = np.zeros(len(self.ks), np.int64)
        self.num_images = 0

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        retrieved, labels = _retrieve(
            logits, label_ids, label_offsets, sample_weights, k=max(self.ks)
        )
        self.num_images += int(labels.any(axis=1).sum())
        self.num_hits += [int(retrieved.relevant[:, :k].any(axis=1).sum()) for k in self.ks]

    def merge(self, other: Self) -> None:
        self.num_hits += other.num_hits
        self.num_images += other.num_images

    def compute(self) -> dict[str, float]:
        return {
            f"top{k}": int(hits) / self.num_images if self.num_images else float("nan")
            for k, hits in zip(self.ks, self.num_hits, strict=True)
        }


class MeanAveragePrecision:
    """Weighted MAP@k, class-wise.

    Every image retrieves its k highest-scoring classes. The images that retrieved class c, ranked
    by its score, have the average precision AP_c = (1 / n_c) sum_r precision@r relevant_r, where
    n_c counts all images with the label, also those that did not retrieve it. The score is sum(w_c
    AP_c) / sum(w_c) over the classes with n_c > 0 and w_c > 0. An image without labels takes part
    as a negative.

    An image keeps 9 bytes for each of its k classes until the end.
    """

    def __init__(
        self, class_weights: NDArray[np.float64], *, k: int = 100, entries_at_once: int = 1 << 22
    ) -> None:
        """`class_weights`: (C,), not negative; their scale does not matter.

        `entries_at_once`: retrieved classes that are ranked together, which bounds the memory of
        `compute`.
        """
        self.class_weights = np.asarray(class_weights, np.float64)
        self.k = min(k, len(self.class_weights))
        self.name = f"map{k}"
        self.entries_at_once = entries_at_once
        self.positives = np.zeros(len(self.class_weights), np.int64)
        self.num_images = 0
        self._retrieved: list[_Retrieved] = []

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        assert logits.shape[1] == len(self.class_weights)
        retrieved, labels = _retrieve(logits, label_ids, label_offsets, sample_weights, k=self.k)
        self._retrieved.append(retrieved)
        self.positives += labels.sum(axis=0)
        self.num_images += len(labels)

    def merge(self, other: Self) -> None:
        self.positives += other.positives
        self.num_images += other.num_images
        self._retrieved += other._retrieved

    def average_precisions(self) -> NDArray[np.float64]:
        """AP_c: (C,); NaN where no image has the label."""
        sums = np.zeros(len(self.positives))
        if not self._retrieved:
            return np.full(len(sums), np.nan)
        for first, stop in self._class_blocks():
            parts = [part.of_classes(first, stop) for part in self._retrieved]
            sums[first:stop] = _precision_sums(_concatenate(parts), first, stop)
        with np.errstate(invalid="ignore"):
            return np.where(self.positives > 0, sums / self.positives, np.nan)

    def compute(self) -> dict[str, float]:
        """The score, and under `..._prevalence` what a scorer without knowledge expects."""
        counts = (self.positives > 0) & (self.class_weights > 0)
        return {
            self.name: _weighted_mean(
                self.average_precisions()[counts], self.class_weights[counts]
            ),
            f"{self.name}_prevalence": prevalence(
                self.class_weights, self.positives, self.num_images
            ),
        }

    def _class_blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of classes, each of about `entries_at_once` entries or of one class."""
        sizes = np.zeros(len(self.positives), np.int64)
        for part in self._retrieved:
            sizes += np.bincount(part.classes.ravel(), minlength=len(sizes))
        block = np.cumsum(sizes) // self.entries_at_once
        borders = np.flatnonzero(np.diff(block)) + 1
        yield from zip([0, *borders.tolist()], [*borders.tolist(), len(sizes)], strict=True)


def prevalence(
    class_weights: NDArray[np.float64], positives: NDArray[np.int64], num_images: int
) -> float:
    """What a constant scorer expects of the MAP: the weighted mean of n_c / N."""
    counts = (positives > 0) & (class_weights > 0)
    return _weighted_mean(positives[counts] / max(num_images, 1), class_weights[counts])


def top_classes(scores: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row of `scores` (N, C) and their classes, ranked: both (N, k)."""
    values, classes = scores.topk(k, dim=1, sorted=False)
    # topk breaks ties as it likes. Within its choice two sorts put that right; where equal scores
    # were left out of it, the whole row is sorted.
    were_cut = (scores >= values.amin(dim=1, keepdim=True)).sum(dim=1) > k
    classes = classes.sort(dim=1).values
    values, order = scores.gather(1, classes).sort(dim=1, descending=True, stable=True)
    classes = classes.gather(1, order)
    whole = scores[were_cut].sort(dim=1, descending=True, stable=True)
    values[were_cut], classes[were_cut] = whole.values[:, :k], whole.indices[:, :k]
    return values, classes


@dataclass(frozen=True)
class _Retrieved:
    """Retrieved classes, in image order: (N, k), best first, or any part of that as one vector."""

    classes: NDArray[np.int32]
    scores: NDArray[np.float32]
    relevant: NDArray[np.bool_]

    def of_classes(self, first: int, stop: int) -> _Retrieved:
        chosen = (self.classes >= first) & (self.classes < stop)
        return _Retrieved(self.classes[chosen], self.scores[chosen], self.relevant[chosen])


def _retrieve(
    logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor, *, k: int
) -> tuple[_Retrieved, NDArray[np.bool_]]:
    """What the images that count retrieve, and their labels (N, C)."""
    counts = sample_weights > 0
    labels = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    labels[label_rows(label_ids, label_offsets), label_ids] = True
    labels = labels[counts]
    scores = logits.detach()[counts].float()
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    values, classes = top_classes(scores, k=min(k, scores.shape[1]))
    relevant = labels.gather(1, classes)
    retrieved = _Retrieved(
        classes.int().cpu().numpy(), values.cpu().numpy(), relevant.cpu().numpy()
    )
    return retrieved, labels.cpu().numpy()


def _concatenate(parts: list[_Retrieved]) -> _Retrieved:
    return _Retrieved(
        np.concatenate([part.classes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.relevant for part in parts]),
    )


def _precision_sums(retrieved: _Retrieved, first: int, stop: int) -> NDArray[np.float64]:
    """The sum over r of precision@r relevant_r for the classes [first, stop)."""
    order = np.lexsort((-retrieved.scores, retrieved.classes))  # stable: equal ones stay in order
    classes = retrieved.classes[order] - first
    relevant = retrieved.relevant[order]
    starts = np.searchsorted(classes, np.arange(stop - first))
    hits_before = np.concatenate([[0], np.cumsum(relevant)])
    chosen = np.flatnonzero(relevant)
    start = starts[classes[chosen]]
    precision = (hits_before[chosen + 1] - hits_before[start]) / (chosen + 1 - start)
    sums = np.zeros(stop - first)
    np.add.at(sums, classes[chosen], precision)
    return sums


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float(np.sum(values * weights) / np.sum(weights)) if len(values) else float("nan")
