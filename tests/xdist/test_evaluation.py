"""Top-k accuracy and both kinds of MAP@k equal naive loops over images and classes, also with ties
and parts.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from xdist.evaluation import (
    ImageMeanAveragePrecision,
    MeanAveragePrecision,
    Measure,
    TopK,
    prevalence,
    top_classes,
)

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


def naive_class_topk(images: Scored, k: int, c: int) -> float:
    hits = [c in ranked(scores)[:k] for scores, labels in images.counted() if c in labels]
    return sum(hits) / len(hits) if hits else math.nan


def naive_average_precision(images: Scored, c: int, k: int) -> float:
    """Of class c; NaN without positives."""
    retrieved, num_positives = [], 0
    for scores, labels in images.counted():
        num_positives += c in labels
        if c in ranked(scores)[:k]:
            retrieved.append((scores[c], c in labels))
    hits, precisions = 0, 0.0
    for rank, (_, relevant) in enumerate(sorted(retrieved, key=lambda pair: -pair[0]), start=1):
        hits += relevant
        precisions += hits / rank if relevant else 0.0
    return precisions / num_positives if num_positives else math.nan


def naive_map(images: Scored, class_weights: list[float], k: int) -> float:
    total = weight_sum = 0.0
    for c, class_weight in enumerate(class_weights):
        average_precision = naive_average_precision(images, c, k)
        if not math.isnan(average_precision) and class_weight > 0:
            total += class_weight * average_precision
            weight_sum += class_weight
    return total / weight_sum if weight_sum else math.nan


def naive_image_map(images: Scored, class_weights: list[float], k: int) -> float:
    average_precisions = []
    for scores, labels in images.counted():
        hits, gained = 0, 0.0
        for rank, c in enumerate(ranked(scores)[:k], start=1):
            hits += c in labels
            gained += hits / rank * class_weights[c] if c in labels else 0.0
        best = sum(sorted((class_weights[c] for c in labels), reverse=True)[:k])
        if best > 0:
            average_precisions.append(gained / best)
    return sum(average_precisions) / len(average_precisions) if average_precisions else math.nan


def weights_for(images: Scored, *, zero_first: bool = False) -> list[float]:
    weights = [1.0 + c for c in range(len(images.scores[0]))]
    return [0.0, *weights[1:]] if zero_first else weights


def new_map(
    weights: list[float], k: int, *, entries_per_run: int = 1 << 19
) -> MeanAveragePrecision:
    return MeanAveragePrecision(np.array(weights), k=k, entries_per_run=entries_per_run)


def new_image_map(weights: list[float], k: int) -> ImageMeanAveragePrecision:
    return ImageMeanAveragePrecision(np.array(weights), k=k)


def same(number: object) -> object:
    return pytest.approx(number, nan_ok=True)


@properties
@given(scored_images(), st.integers(1, 8))
def test_topk_equals_a_naive_loop(images: Scored, k: int) -> None:
    num_classes = len(images.scores[0])
    measure = TopK(num_classes, (1, k))
    images.feed(measure)
    expected = {"top1": naive_topk(images, 1), f"top{k}": naive_topk(images, k)}
    assert measure.compute() == same(expected)
    naive = [naive_class_topk(images, k, c) for c in range(num_classes)]
    assert measure.per_class()[f"top{k}"].tolist() == same(naive)


@properties
@given(scored_images(), st.integers(1, 8), st.booleans(), st.sampled_from([1, 5, 1 << 19]))
def test_map_equals_a_naive_loop(
    images: Scored, k: int, zero_first: bool, entries_per_run: int
) -> None:
    weights = weights_for(images, zero_first=zero_first)
    measure = new_map(weights, k, entries_per_run=entries_per_run)
    images.feed(measure)
    assert measure.compute()[f"map{k}"] == same(naive_map(images, weights, k))
    naive = [naive_average_precision(images, c, k) for c in range(len(weights))]
    assert measure.per_class()["average_precision"].tolist() == same(naive)
    counted = [sum(c in labels for _, labels in images.counted()) for c in range(len(weights))]
    assert measure.positives.tolist() == counted


@properties
@given(scored_images(), st.integers(1, 8), st.booleans())
def test_image_wise_map_equals_a_naive_loop(images: Scored, k: int, zero_first: bool) -> None:
    weights = weights_for(images, zero_first=zero_first)
    measure = new_image_map(weights, k)
    images.feed(measure)
    expected = naive_image_map(images, weights, k)
    assert measure.compute() == same({f"map{k}_image_wise": expected})


def every_measure(images: Scored) -> list[Callable[[], Measure]]:
    """Ways to make each of them, with runs that end in the middle of an image."""
    weights = weights_for(images)
    return [
        lambda: TopK(len(weights), (1, 2)),
        lambda: new_map(weights, 3, entries_per_run=4),
        lambda: new_image_map(weights, 3),
    ]


@properties
@given(scored_images(), st.lists(st.integers(0, 9), max_size=4))
def test_streamed_and_sharded_results_equal_the_one_shot_result_exactly(
    images: Scored, cuts: list[int]
) -> None:
    num_images = len(images.labels)
    borders = [0, *sorted(min(cut, num_images) for cut in cuts), num_images]
    for new in every_measure(images):
        whole, streamed, merged = new(), new(), new()
        images.feed(whole)
        for start, stop in itertools.pairwise(borders):
            part = new()
            images.feed(streamed, start, stop)
            images.feed(part, start, stop)
            merged.merge(pickle.loads(pickle.dumps(part)))  # As it comes from another process.
        for measure in (streamed, merged):
            np.testing.assert_equal(measure.compute(), whole.compute())
            np.testing.assert_equal(measure.per_class(), whole.per_class())
            np.testing.assert_equal(measure.positives, whole.positives)


@properties
@given(scored_images(), st.integers(1, 6))
def test_top_classes_breaks_ties_by_class(images: Scored, k: int) -> None:
    scores = torch.tensor(images.scores)
    k = min(k, scores.shape[1])
    values, classes = top_classes(scores, k=k)
    assert classes.tolist() == [ranked(row)[:k] for row in images.scores]
    assert torch.equal(values, scores.gather(1, classes))


@pytest.mark.parametrize("new", [new_map, new_image_map])
def test_weights_scale_does_not_matter(new: Callable[[list[float], int], Measure]) -> None:
    results = []
    for scale in (1.0, 1e-3):
        measure = new([scale * (1 + c) for c in range(20)], 5)
        random_images(seed=0).feed(measure)
        results.append(measure.compute())
    assert results[0] == pytest.approx(results[1])


def random_images(*, seed: int, num_images: int = 60, num_classes: int = 20) -> Scored:
    rng = np.random.default_rng(seed)
    scores: NDArray[np.float32] = rng.standard_normal((num_images, num_classes), np.float32)
    labels = [set(rng.choice(num_classes, 3, replace=False).tolist()) for _ in range(num_images)]
    return Scored(scores.tolist(), labels, [1.0] * num_images)


@pytest.mark.parametrize("k", [2, 5])
def test_perfect_scores_give_one(k: int) -> None:
    """Image-wise also where an image has more labels than places; class-wise that is a miss."""
    images = random_images(seed=0)
    weights = [1.0 + c for c in range(20)]
    perfect = [[weights[c] if c in labels else 0.0 for c in range(20)] for labels in images.labels]
    by_class, by_image = new_map(weights, k), new_image_map(weights, k)
    for measure in (by_class, by_image):
        Scored(perfect, images.labels, images.sample_weights).feed(measure)
    assert by_image.compute() == {f"map{k}_image_wise": pytest.approx(1.0)}
    assert (by_class.compute()[f"map{k}"] == 1.0) == (k == 5)


def test_positives_beyond_the_top_k_are_misses() -> None:
    measure = new_map([1.0, 1.0], 1)
    Scored([[2.0, 1.0], [2.0, 1.0]], [{0, 1}, {0}], [1.0, 1.0]).feed(measure)
    assert measure.average_precisions().tolist() == [1.0, 0.0]


def test_classes_without_positives_are_left_out() -> None:
    measure = new_map([1.0, 5.0, 1.0], 3)
    Scored([[1.0, 3.0, 0.0]], [{0}], [1.0]).feed(measure)
    np.testing.assert_equal(measure.average_precisions(), [1.0, math.nan, math.nan])
    assert measure.compute()["map3"] == 1.0


def test_an_image_without_labels_ranks_as_a_negative_of_classes_and_is_no_image_to_score() -> None:
    images = Scored([[2.0], [1.0]], [set(), {0}], [1.0, 1.0])
    by_class, by_image, top1 = new_map([1.0], 1), new_image_map([1.0], 1), TopK(1, (1,))
    for measure in (by_class, by_image, top1):
        images.feed(measure)
    assert by_class.compute() == {"map1": 0.5, "map1_prevalence": 0.5}
    assert by_image.compute() == {"map1_image_wise": 1.0}
    assert top1.compute() == {"top1": 1.0}


def test_equal_scores_rank_by_class_in_an_image_and_by_image_in_a_class() -> None:
    images = Scored([[1.0, 1.0], [1.0, 1.0]], [{1}, {0}], [1.0, 1.0])
    by_class, by_image = new_map([1.0, 1.0], 2), new_image_map([1.0, 1.0], 2)
    for measure in (by_class, by_image):
        images.feed(measure)
    assert by_class.average_precisions().tolist() == [0.5, 1.0]
    assert by_image.compute() == {"map2_image_wise": (0.5 + 1.0) / 2}


def test_k_is_at_most_the_number_of_classes() -> None:
    images = Scored([[0.0, 1.0]], [{0, 1}], [1.0])
    for measure in (new_map([1.0, 1.0], 100), new_image_map([1.0, 1.0], 100)):
        images.feed(measure)
        assert 1.0 in measure.compute().values()


def test_nothing_to_score_is_nan() -> None:
    for measure in (TopK(2), new_map([1.0, 1.0], 2), new_image_map([1.0, 1.0], 2)):
        assert all(math.isnan(value) for value in measure.compute().values())
        Scored([[1.0, 0.0]], [{0}], [0.0]).feed(measure)
        assert all(math.isnan(value) for value in measure.compute().values())


def test_classes_without_weight_alone_are_nothing_to_score() -> None:
    for measure in (new_map([0.0, 1.0], 2), new_image_map([0.0, 1.0], 2)):
        Scored([[1.0, 0.0]], [{0}], [1.0]).feed(measure)
        assert all(math.isnan(value) for value in measure.compute().values())


def test_nan_scores_rank_last() -> None:
    measure = TopK(2, (1,))
    Scored([[math.nan, 0.0], [math.nan, 0.0]], [{0}, {1}], [1.0, 1.0]).feed(measure)
    assert measure.compute() == {"top1": 0.5}


def test_scored_logits_are_left_as_they_were() -> None:
    logits = torch.tensor([[math.nan, 0.0]])
    TopK(2).update(logits, torch.tensor([1]), torch.tensor([0, 1]), torch.ones(1))
    assert logits.isnan().tolist() == [[True, False]]


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


def test_half_precision_logits_are_scored() -> None:
    logits: Tensor = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    measure = TopK(2, (1,))
    measure.update(logits, torch.tensor([1]), torch.tensor([0, 1]), torch.ones(1))
    assert measure.compute() == {"top1": 1.0}


def test_an_image_keeps_33_bits_a_retrieved_class() -> None:
    """What a worker sends and a driver merges; beside it the offsets of one run."""
    num_images, num_classes, k = 640, 400, 100
    measure = new_map([1.0] * num_classes, k, entries_per_run=num_images * k)
    logits = torch.randn(num_images, num_classes, generator=torch.Generator().manual_seed(0))
    nothing = len(pickle.dumps(measure))
    measure.update(
        logits,
        torch.zeros(num_images, dtype=torch.int64),
        torch.arange(num_images + 1),
        torch.ones(num_images),
    )
    kept = len(pickle.dumps(measure)) - nothing
    assert kept == pytest.approx(num_images * k * 33 / 8 + 4 * (num_classes + 1), rel=0.01)
