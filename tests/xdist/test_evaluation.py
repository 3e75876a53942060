"""Top-k accuracy and MAP@k equal naive loops over images and classes, also with ties and parts."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from xdist.evaluation import MeanAveragePrecision, Measure, TopK, prevalence, top_classes

properties = settings(derandomize=True, deadline=None, max_examples=80)


@dataclass(frozen=True)
class Scored:
    """Images with scores and labels; those of weight 0 do not count."""

    scores: list[list[float]]
    labels: list[set[int]]
    sample_weights: list[float]

    def feed(self, measure: Measure, start: int = 0, stop: int | None = None) -> None:
        labels = self.labels[start:stop]
        ids = torch.tensor([label for of_image in labels for label in of_image], dtype=torch.int64)
        offsets = torch.tensor([0, *(len(of_image) for of_image in labels)]).cumsum(0)
        weights = torch.tensor(self.sample_weights[start:stop])
        scores = torch.tensor(self.scores)[start:stop]
        measure.update(scores, ids, offsets, weights)

    def counted(self) -> list[tuple[list[float], set[int]]]:
        rows = zip(self.scores, self.labels, self.sample_weights, strict=True)
        return [(scores, labels) for scores, labels, weight in rows if weight > 0]


@st.composite
def scored_images(draw: st.DrawFn) -> Scored:
    num_images, num_classes = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    few_values = st.sampled_from([-1.0, 0.0, 0.5, 2.0])  # so that ties are common
    row = st.lists(few_values, min_size=num_classes, max_size=num_classes)
    labels = st.sets(st.integers(0, num_classes - 1))
    return Scored(
        [draw(row) for _ in range(num_images)],
        [draw(labels) for _ in range(num_images)],
        [draw(st.sampled_from([0.0, 1.0, 1.0])) for _ in range(num_images)],
    )


def ranked(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def naive_topk(images: Scored, k: int) -> float:
    hits = [bool(labels & set(ranked(scores)[:k])) for scores, labels in images.counted() if labels]
    return sum(hits) / len(hits) if hits else math.nan


def naive_map(images: Scored, class_weights: list[float], k: int) -> float:
    total = weight_sum = 0.0
    for c, class_weight in enumerate(class_weights):
        retrieved, num_positives = [], 0
        for scores, labels in images.counted():
            num_positives += c in labels
            if c in ranked(scores)[:k]:
                retrieved.append((scores[c], c in labels))
        if num_positives == 0 or class_weight == 0:
            continue
        hits, precisions = 0, 0.0
        for rank, (_, relevant) in enumerate(sorted(retrieved, key=lambda pair: -pair[0]), start=1):
            hits += relevant
            precisions += hits / rank if relevant else 0.0
        total += class_weight * precisions / num_positives
        weight_sum += class_weight
    return total / weight_sum if weight_sum else math.nan


def weights_for(images: Scored, *, zero_first: bool = False) -> list[float]:
    weights = [1.0 + c for c in range(len(images.scores[0]))]
    return [0.0, *weights[1:]] if zero_first else weights


def new_map(
    weights: list[float], k: int, *, entries_at_once: int = 1 << 22
) -> MeanAveragePrecision:
    return MeanAveragePrecision(np.array(weights), k=k, entries_at_once=entries_at_once)


@properties
@given(scored_images(), st.integers(1, 8))
def test_topk_equals_a_naive_loop(images: Scored, k: int) -> None:
    measure = TopK((1, k))
    images.feed(measure)
    expected = {"top1": naive_topk(images, 1), f"top{k}": naive_topk(images, k)}
    assert measure.compute() == pytest.approx(expected, nan_ok=True)


@properties
@given(scored_images(), st.integers(1, 8), st.booleans(), st.sampled_from([1, 5, 1 << 22]))
def test_map_equals_a_naive_loop(
    images: Scored, k: int, zero_first: bool, entries_at_once: int
) -> None:
    weights = weights_for(images, zero_first=zero_first)
    measure = new_map(weights, k, entries_at_once=entries_at_once)
    images.feed(measure)
    expected = naive_map(images, weights, k)
    assert measure.compute()[f"map{k}"] == pytest.approx(expected, nan_ok=True)


@properties
@given(scored_images(), st.integers(0, 9), st.integers(0, 9))
def test_parts_that_are_merged_equal_one_shot_exactly(
    images: Scored, cut: int, other_cut: int
) -> None:
    first, second = sorted(min(cut, len(images.labels)) for cut in (cut, other_cut))
    for new in (lambda: TopK((1, 2)), lambda: new_map(weights_for(images), 3)):
        whole, parts = new(), [new(), new(), new()]
        images.feed(whole)
        for part, start, stop in zip(parts, (0, first, second), (first, second, None), strict=True):
            images.feed(part, start, stop)
        merged = pickle.loads(pickle.dumps(parts[0]))  # as it comes from another process
        for part in parts[1:]:
            merged.merge(part)
        np.testing.assert_equal(merged.compute(), whole.compute())


@properties
@given(scored_images(), st.integers(1, 6))
def test_top_classes_breaks_ties_by_class(images: Scored, k: int) -> None:
    scores = torch.tensor(images.scores)
    k = min(k, scores.shape[1])
    values, classes = top_classes(scores, k=k)
    assert classes.tolist() == [ranked(row)[:k] for row in images.scores]
    assert torch.equal(values, scores.gather(1, classes))


def test_weights_scale_does_not_matter() -> None:
    images = random_images(seed=0)
    results = []
    for scale in (1.0, 1e-3):
        measure = new_map([scale * (1 + c) for c in range(20)], 5)
        images.feed(measure)
        results.append(measure.compute()["map5"])
    assert results[0] == pytest.approx(results[1])


def random_images(*, seed: int, num_images: int = 60, num_classes: int = 20) -> Scored:
    rng = np.random.default_rng(seed)
    scores: NDArray[np.float32] = rng.standard_normal((num_images, num_classes), np.float32)
    labels = [set(rng.choice(num_classes, 3, replace=False).tolist()) for _ in range(num_images)]
    return Scored(scores.tolist(), labels, [1.0] * num_images)


def test_perfect_scores_give_one() -> None:
    images = random_images(seed=0)
    perfect = [[float(c in labels) for c in range(20)] for labels in images.labels]
    measure = new_map([1.0] * 20, 5)
    Scored(perfect, images.labels, images.sample_weights).feed(measure)
    assert measure.compute()["map5"] == 1.0


def test_positives_beyond_the_top_k_are_misses() -> None:
    measure = new_map([1.0, 1.0], 1)
    Scored([[2.0, 1.0], [2.0, 1.0]], [{0, 1}, {0}], [1.0, 1.0]).feed(measure)
    assert measure.average_precisions().tolist() == [1.0, 0.0]


def test_classes_without_positives_are_left_out() -> None:
    measure = new_map([1.0, 5.0, 1.0], 3)
    Scored([[1.0, 3.0, 0.0]], [{0}], [1.0]).feed(measure)
    np.testing.assert_equal(measure.average_precisions(), [1.0, math.nan, math.nan])
    assert measure.compute()["map3"] == 1.0


def test_an_image_without_labels_ranks_as_a_negative() -> None:
    measure = new_map([1.0], 1)
    Scored([[2.0], [1.0]], [set(), {0}], [1.0, 1.0]).feed(measure)
    assert measure.compute() == {"map1": 0.5, "map1_prevalence": 0.5}


def test_nothing_to_score_is_nan() -> None:
    for measure in (TopK(), new_map([1.0, 1.0], 2)):
        assert all(math.isnan(value) for value in measure.compute().values())
        Scored([[1.0, 0.0]], [{0}], [0.0]).feed(measure)
        assert all(math.isnan(value) for value in measure.compute().values())


def test_nan_scores_rank_last() -> None:
    measure = TopK((1,))
    Scored([[math.nan, 0.0], [math.nan, 0.0]], [{0}, {1}], [1.0, 1.0]).feed(measure)
    assert measure.compute() == {"top1": 0.5}


def test_prevalence_is_the_weighted_share_of_positives() -> None:
    weights, positives = np.array([3.0, 1.0, 0.0, 7.0]), np.array([50, 10, 99, 0])
    assert prevalence(weights, positives, 100) == pytest.approx((3 * 0.5 + 1 * 0.1) / 4)


def test_random_scores_come_near_the_prevalence() -> None:
    """The AP of a random order exceeds n_c / N by about ln(N) / N, here 0.003."""
    images = random_images(seed=3, num_images=2000)
    measure = new_map([1.0] * 20, 20)
    images.feed(measure)
    scores = measure.compute()
    assert scores["map20"] == pytest.approx(scores["map20_prevalence"], abs=0.01)
    assert scores["map20_prevalence"] == pytest.approx(3 / 20)


def test_map_of_batches_equals_map_of_the_whole() -> None:
    images = random_images(seed=4)
    whole, batches = new_map([1.0] * 20, 5), new_map([1.0] * 20, 5, entries_at_once=50)
    images.feed(whole)
    for start in range(0, 60, 7):
        images.feed(batches, start, start + 7)
    assert whole.compute() == batches.compute()


def test_half_precision_logits_are_scored() -> None:
    logits: Tensor = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    measure = TopK((1,))
    measure.update(logits, torch.tensor([1]), torch.tensor([0, 1]), torch.ones(1))
    assert measure.compute() == {"top1": 1.0}
