"""Top-k accuracy and weighted MAP@100, as accumulators that take a batch at a time.

Batches are logits with CSR labels (see `losses`); samples of weight 0 are left out. Accumulators of
the parts of a data set, merged in the order of the parts, hold what one accumulator of the whole
would hold, and compute the same scores to the bit. Scores are ranked descending; equal ones by
ascending class within an image, by image order within a class, so no result depends on a sort. A
NaN ranks last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.losses import label_rows


class Measure(Protocol):
    """A score that is accumulated over batches."""

    positives: NDArray[np.int64]
    """(C,): images that have the label."""

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        """Take a batch: logits (N, C), CSR labels, weights (N,); 0 leaves a sample out."""

    def merge(self, other: Self) -> None:
        """Take what `other` has taken, after one's own."""

    def compute(self) -> dict[str, float]:
        """The scores by name; NaN where no image counts."""

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        """Scores of each class by name: (C,) each; NaN where no image has the label."""


class TopK:
    """Share of the images that have a label among their k highest scores, for every k.

    Images without labels do not count. Of a class: the share of the images with this label that
    have it among their k highest.
    """

    def __init__(self, num_classes: int, ks: Sequence[int] = (1, 5)) -> None:
        self.ks = tuple(ks)
        self.num_images = 0
        self.num_hits = np.zeros(len(self.ks), np.int64)
        self.positives = np.zeros(num_classes, np.int64)
        self._class_hits = np.zeros((len(self.ks), num_classes), np.int64)

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        retrieved, labels = _retrieve(
            logits, label_ids, label_offsets, sample_weights, k=max(self.ks)
        )
        self.num_images += int(labels.any(axis=1).sum())
        self.positives += labels.sum(axis=0)
        for number, k in enumerate(self.ks):
            relevant = retrieved.relevant[:, :k]
            self.num_hits[number] += relevant.any(axis=1).sum()
            hit = retrieved.classes[:, :k][relevant]
            self._class_hits[number] += np.bincount(hit, minlength=len(self.positives))

    def merge(self, other: Self) -> None:
        self.num_images += other.num_images
        self.num_hits += other.num_hits
        self.positives += other.positives
        self._class_hits += other._class_hits

    def compute(self) -> dict[str, float]:
        return {
            f"top{k}": int(hits) / self.num_images if self.num_images else float("nan")
            for k, hits in zip(self.ks, self.num_hits, strict=True)
        }

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        return {
            f"top{k}": _ratio(hits, self.positives)
            for k, hits in zip(self.ks, self._class_hits, strict=True)
        }


class MeanAveragePrecision:
    """Weighted MAP@k, class-wise.

    Every image retrieves its k highest-scoring classes. The images that retrieved class c, ranked
    by its score, have the average precision AP_c = (1 / n_c) sum_r precision@r relevant_r, where
    n_c counts all images with the label, also those that did not retrieve it. The score is sum(w_c
    AP_c) / sum(w_c) over the classes with n_c > 0 and w_c > 0. An image without labels takes part
    as a negative.

    An image keeps 33 bits for each of its k classes until the end: a score, and whether it is
    right; for every `entries_per_run` of these there are C + 1 numbers of 32 bits. The classes are
    ranked one after the other.
    """

    def __init__(
        self, class_weights: NDArray[np.float64], *, k: int = 100, entries_per_run: int = 1 << 19
    ) -> None:
        """`class_weights`: (C,), not negative; their scale does not matter.

        `entries_per_run`: retrieved classes that wait to be sorted by class and kept together.
        """
        self.class_weights = np.asarray(class_weights, np.float64)
        self.k = min(k, len(self.class_weights))
        self.name = f"map{k}"
        self.positives = np.zeros(len(self.class_weights), np.int64)
        self.num_images = 0
        self._runs: list[_Run] = []
        self._waiting = _Waiting(entries_per_run, num_classes=len(self.positives))

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        assert logits.shape[1] == len(self.class_weights)
        retrieved, labels = _retrieve(logits, label_ids, label_offsets, sample_weights, k=self.k)
        self.positives += labels.sum(axis=0)
        self.num_images += len(labels)
        first = 0
        while first < retrieved.scores.size:
            first += self._waiting.take(retrieved, first=first)
            if self._waiting.is_full:
                self._close_run()

    def merge(self, other: Self) -> None:
        self.positives += other.positives
        self.num_images += other.num_images
        self._close_run()
        other._close_run()
        self._runs += other._runs

    def average_precisions(self) -> NDArray[np.float64]:
        """AP_c: (C,); NaN where no image has the label."""
        self._close_run()
        sums = np.zeros(len(self.positives))
        for number in np.flatnonzero(self.positives).tolist():
            parts = [run.of_class(number) for run in self._runs]
            scores = np.concatenate([scores for scores, _ in parts])
            relevant = np.concatenate([relevant for _, relevant in parts])
            sums[number] = _precision_sum(scores, relevant)
        return _ratio(sums, self.positives)

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

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        return {"average_precision": self.average_precisions()}

    def _close_run(self) -> None:
        if self._waiting.num_entries:
            self._runs.append(_Run.of(self._waiting, num_classes=len(self.positives)))
            self._waiting.num_entries = 0


class ImageMeanAveragePrecision:
    """Weighted MAP@k, image-wise.

    Image i ranks its k highest-scoring classes: AP_i = sum_r precision@r relevant_r w_c(r), over
    the sum of the min(k, n_i) largest weights among its n_i labels: what a perfect ranking gets.
    The score is the mean over the images with a label that weighs something.

    An image keeps 8 bytes until the end.
    """

    def __init__(self, class_weights: NDArray[np.float64], *, k: int = 100) -> None:
        """`class_weights`: (C,), not negative; their scale does not matter."""
        self.class_weights = np.asarray(class_weights, np.float64)
        self.k = min(k, len(self.class_weights))
        self.name = f"map{k}_image_wise"
        self.positives = np.zeros(len(self.class_weights), np.int64)
        self._heaviest_first = np.argsort(-self.class_weights, kind="stable")
        self._average_precisions: list[NDArray[np.float64]] = []

    def update(
        self, logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor
    ) -> None:
        retrieved, labels = _retrieve(logits, label_ids, label_offsets, sample_weights, k=self.k)
        self.positives += labels.sum(axis=0)
        relevant = retrieved.relevant
        precision = np.cumsum(relevant, axis=1) / np.arange(1, self.k + 1)
        gained = _row_sums(precision * relevant * self.class_weights[retrieved.classes])
        labels = labels[:, self._heaviest_first]
        labels &= np.cumsum(labels, axis=1) <= self.k
        best = _row_sums(labels * self.class_weights[self._heaviest_first])
        self._average_precisions.append(gained[best > 0] / best[best > 0])

    def merge(self, other: Self) -> None:
        self.positives += other.positives
        self._average_precisions += other._average_precisions

    def compute(self) -> dict[str, float]:
        """The score."""
        kept = np.concatenate([np.zeros(0), *self._average_precisions])
        return {self.name: float(kept.mean()) if kept.size else float("nan")}

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        return {}


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
    """The retrieved classes of some images, in image order: (N, k), best first."""

    classes: NDArray[np.int32]
    scores: NDArray[np.float32]
    relevant: NDArray[np.bool_]


class _Waiting:
    """Room for retrieved classes, one after the other in image order. It is taken once: small
    arrays that come and go between large ones would leave the process's memory full of holes.
    """

    def __init__(self, capacity: int, *, num_classes: int) -> None:
        self.num_entries = 0
        self.classes = np.empty(capacity, np.min_scalar_type(num_classes))
        self.scores = np.empty(capacity, np.float32)
        self.relevant = np.empty(capacity, np.bool_)

    @property
    def is_full(self) -> bool:
        return self.num_entries == len(self.scores)

    def take(self, retrieved: _Retrieved, *, first: int) -> int:
        """Take those from number `first` on, as far as there is room; returns how many."""
        count = min(retrieved.scores.size - first, len(self.scores) - self.num_entries)
        source = slice(first, first + count)
        target = slice(self.num_entries, self.num_entries + count)
        self.classes[target] = retrieved.classes.ravel()[source]
        self.scores[target] = retrieved.scores.ravel()[source]
        self.relevant[target] = retrieved.relevant.ravel()[source]
        self.num_entries += count
        return count


@dataclass(frozen=True)
class _Run:
    """The retrieved classes of neighbouring images, class after class, each in image order."""

    scores: NDArray[np.float32]
    relevant: NDArray[np.uint8]
    """One bit each."""
    offsets: NDArray[np.int32]
    """(C + 1,): class c has the scores [offsets[c], offsets[c + 1])."""

    @classmethod
    def of(cls, waiting: _Waiting, *, num_classes: int) -> _Run:
        classes = waiting.classes[: waiting.num_entries]
        order = np.argsort(classes, kind="stable")
        offsets = np.zeros(num_classes + 1, np.int32)
        np.cumsum(np.bincount(classes, minlength=num_classes), out=offsets[1:])
        return cls(waiting.scores[order], np.packbits(waiting.relevant[order]), offsets)

    def of_class(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The scores of a class and whether each is right."""
        start, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        first = start // 8
        bits = np.unpackbits(self.relevant[first : -(-stop // 8)])
        return self.scores[start:stop], bits[start - 8 * first : stop - 8 * first].view(np.bool_)


def _retrieve(
    logits: Tensor, label_ids: Tensor, label_offsets: Tensor, sample_weights: Tensor, *, k: int
) -> tuple[_Retrieved, NDArray[np.bool_]]:
    """What the images that count retrieve, and their labels (N, C)."""
    counts = sample_weights > 0
    labels = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    labels[label_rows(label_ids, label_offsets), label_ids] = True
    labels = labels[counts]
    scores = logits.detach()[counts].float()  # A copy.
    scores.masked_fill_(scores.isnan(), -torch.inf)
    values, classes = top_classes(scores, k=min(k, scores.shape[1]))
    relevant = labels.gather(1, classes)
    retrieved = _Retrieved(
        classes.int().cpu().numpy(), values.cpu().numpy(), relevant.cpu().numpy()
    )
    return retrieved, labels.cpu().numpy()


def _precision_sum(scores: NDArray[np.float32], relevant: NDArray[np.bool_]) -> float:
    """The sum over r of precision@r relevant_r, where equal scores rank in the order given."""
    order = np.argsort(-scores, kind="stable")
    ranks = np.flatnonzero(relevant[order]) + 1
    return float(np.sum(np.arange(1, len(ranks) + 1) / ranks))


def _row_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K) -> (N,), each added up from left to right, whatever the other rows are."""
    sums: NDArray[np.float64] = np.cumsum(values, axis=1)[:, -1]
    return sums


def _ratio(
    numerators: NDArray[np.int64] | NDArray[np.float64], counts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Each numerator over its count; NaN where that is 0."""
    ratios = np.full(len(counts), np.nan)
    np.divide(numerators, counts, out=ratios, where=counts > 0)
    return ratios


def _weighted_mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float(np.sum(values * weights) / np.sum(weights)) if len(values) else float("nan")
