"""Scoring a checkpoint: what counts, in which parts, and which checkpoints have their turn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from datapipe.index import ShardIndex, index_shards
from datapipe.labels import Label, write_labels
from datapipe.position import Position
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import encode, picture
from tests.small_runs import NUM_LABELS, small_config, spoil
from xdist import checkpoint
from xdist.checkpoint import Checkpoint, Cut, Manifest
from xdist.config import CheckpointConfig, TrainConfig
from xdist.errors import UnknownFormat, UserError
from xdist.evaluation_config import EvaluationConfig, MeasureName
from xdist.flat import FlatModel
from xdist.scorer import ScoringQueue, ScoringRequest
from xdist.scoring import (
    ScoringPlan,
    Tally,
    load_model,
    measures,
    plan_scoring,
    score_part,
    skipped_samples,
)
from xdist.state import AVERAGE, STATISTICS, STATISTICS_AVERAGE, WEIGHTS
from xdist.worker import initial_model

ALL: tuple[MeasureName, ...] = ("top_k", "map", "map_image_wise")
NUM_IMAGES = 30
LABELS = tuple(Label(i, f"label {i}", 0.1 + i / 100) for i in range(NUM_LABELS))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Thirty images in one shard, two labels each, scored in eight batches."""
    config = small_config(tmp_path, strategy="push_pull", is_scored=True)
    return replace(config, evaluation=EvaluationConfig(measures=ALL, batch_size=4))


def with_evaluation(config: TrainConfig, **changes: Any) -> TrainConfig:
    return replace(config, evaluation=replace(config.evaluation, **changes))


def evaluation_url(config: TrainConfig) -> str:
    assert config.data.evaluation is not None
    return config.data.evaluation


def plan_of(config: TrainConfig, *, labels: Sequence[Label] = LABELS) -> ScoringPlan:
    return plan_scoring(
        config,
        index_url=evaluation_url(config),
        num_classes=NUM_LABELS,
        labels=labels,
        frequencies=[label.weight for label in LABELS],
    )


def saved(
    config: TrainConfig, directory: Path, *, with_average: bool = True, noise: float = 0.0
) -> Checkpoint:
    """A checkpoint of random weights, whose average is others. noise: that is added to these."""
    flat = flat_model(config)
    ranges, statistics = {WEIGHTS: flat.weights}, {STATISTICS: flat.statistics}
    if with_average:
        average = flat_model(replace(config, seed=1)).weights
        generator = torch.Generator().manual_seed(0)
        ranges[AVERAGE] = average + noise * torch.randn(average.shape, generator=generator)
        statistics[STATISTICS_AVERAGE] = flat.statistics + 1
    checkpoint.make_directory(str(directory / "run"))
    url = checkpoint.checkpoint_url(str(directory / "run"), 7)
    parts = (
        checkpoint.write_range(url, ranges, start=0, stop=flat.layout.num_weights),
        checkpoint.write_statistics(url, statistics),
    )
    cut = Cut(7, 28, Position(), is_final=False)
    return checkpoint.publish(url, Manifest(cut, flat.layout, parts, {}, config.to_json(), {}))


def flat_model(config: TrainConfig) -> FlatModel:
    assert config.model.num_classes is not None
    return FlatModel(initial_model(config, num_classes=config.model.num_classes))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
def test_parts_add_up_to_the_whole_to_the_bit(
    config: TrainConfig, tmp_path: Path, num_parts: int
) -> None:
    plan, url = plan_of(config), saved(config, tmp_path).url
    whole, merged = score_part(plan, url, "raw", part=0, num_parts=1), Tally.empty(plan)
    for part in range(num_parts):
        merged.merge(score_part(plan, url, "raw", part=part, num_parts=num_parts))
    assert merged.scores() == whole.scores()
    np.testing.assert_equal(merged.per_class(), whole.per_class())
    assert merged.num_images == whole.num_images == NUM_IMAGES


def test_all_measures_are_scored_on_both_kinds_of_weights(
    config: TrainConfig, tmp_path: Path
) -> None:
    plan, url = plan_of(config), saved(config, tmp_path).url
    found = score_part(plan, url, "raw")
    raw, corrupt = found.scores(), tuple(found.corrupt)
    average = score_part(plan, url, "average").scores()
    assert set(raw) == {"top1", "top5", "map100", "map100_prevalence", "map100_image_wise"}
    assert raw["map100_prevalence"] == average["map100_prevalence"]
    assert raw["map100"] != average["map100"]
    assert corrupt == ()


def test_the_loss_chooses_the_measure_by_default(config: TrainConfig) -> None:
    config = with_evaluation(config, measures=())
    assert measures(config) == ("map",)
    assert measures(replace(config, loss="softmax")) == ("top_k",)


def test_positives_are_those_of_the_labels(config: TrainConfig, tmp_path: Path) -> None:
    tally = score_part(plan_of(config), saved(config, tmp_path).url, "raw", part=0, num_parts=1)
    frequencies = ShardIndex.open(evaluation_url(config)).label_frequencies()
    assert (tally.positives / NUM_IMAGES).tolist() == pytest.approx(frequencies.tolist())


def test_corrupt_images_do_not_count_and_are_named(config: TrainConfig, tmp_path: Path) -> None:
    spoil(Path(evaluation_url(config)) / "evaluation-00000.tar", num_samples=3)
    tally = score_part(plan_of(config), saved(config, tmp_path).url, "raw", part=0, num_parts=1)
    assert tally.num_images == NUM_IMAGES - 3
    assert [sample.key for sample in tally.corrupt] == ["000000", "000001", "000002"]


class TestLabelSpace:
    """Only the intersection is scored, and the rest is said."""

    def test_of_a_smaller_evaluation_set(
        self, config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        few = [Label(i, name, 1.0) for i, name in enumerate(["label 9", "label 2", "yak"])]
        write_labels(f"{evaluation_url(config)}/labels.json", few)
        plan = plan_of(config)
        assert plan.space.outputs.tolist() == [2, 9]
        assert plan.class_weights.tolist() == [LABELS[2].weight, LABELS[9].weight]
        assert "outputs_scored=2 outputs=10" in caplog.text
        tally = score_part(plan, saved(config, tmp_path).url, "raw", part=0, num_parts=1)
        table = ShardIndex.open(evaluation_url(config)).table(0)
        counts = np.bincount(table.label_ids)
        assert tally.positives.tolist() == [counts[1], counts[0]]
        assert tally.num_labels_left_out == counts.sum() - counts[0] - counts[1]

    def test_of_labels_beyond_the_outputs(self, config: TrainConfig, tmp_path: Path) -> None:
        """Without a labels.json the ids of the evaluation set are the model's."""
        Path(evaluation_url(config), "labels.json").unlink()
        narrow = replace(config, model=replace(config.model, num_classes=8))
        plan = plan_scoring(
            narrow,
            index_url=evaluation_url(config),
            num_classes=8,
            labels=LABELS[:8],
            frequencies=[1.0] * 8,
        )
        assert plan.space.columns.tolist() == [*range(8), -1, -1]
        tally = score_part(plan, saved(narrow, tmp_path).url, "raw", part=0, num_parts=1)
        label_ids = ShardIndex.open(evaluation_url(config)).table(0).label_ids
        assert tally.num_labels_left_out == (label_ids >= 8).sum() > 0

    def test_of_the_class_weights(self, config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "w.csv").write_text("label,weight\nlabel 3,2\n7,1\n")
        plan = plan_of(with_evaluation(config, class_weights=str(tmp_path / "w.csv")))
        assert plan.space.outputs.tolist() == [3, 7]
        assert plan.class_weights.tolist() == [2.0, 1.0]

    def test_map_needs_weights_and_top_k_does_not(self, config: TrainConfig) -> None:
        def plan(names: tuple[MeasureName, ...]) -> ScoringPlan:
            return plan_scoring(
                with_evaluation(config, measures=names),
                index_url=evaluation_url(config),
                num_classes=NUM_LABELS,
                labels=(),
                frequencies=None,
            )

        with pytest.raises(UserError, match=r"give evaluation\.class_weights a file"):
            plan(("top_k", "map"))
        assert np.isnan(plan(("top_k",)).class_weights).all()


class TestSkippedSamples:
    """The samples of a file do not count."""

    def test_they_are_known_by_their_keys(
        self, config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "skip.txt").write_text("000003\n\n000029.jpg\nabsent\n")
        plan = plan_of(with_evaluation(config, skip=str(tmp_path / "skip.txt")))
        assert plan.skipped.tolist() == [3, 29]
        assert "samples to skip found=2 listed=3" in caplog.text
        url = saved(config, tmp_path).url
        tally = score_part(plan, url, "raw", part=0, num_parts=1)
        assert (tally.num_images, tally.num_skipped) == (NUM_IMAGES - 2, 2)
        everything = score_part(plan_of(config), url, "raw", part=0, num_parts=1)
        labels = ShardIndex.open(evaluation_url(config)).table(0).label_ids[6:8]
        assert (everything.positives - tally.positives)[labels].min() >= 1

    def test_numbers_stand_for_ilsvrc_validation_images(self, tmp_path: Path) -> None:
        """The form of the devkit's blacklist, on shards that keep the images' names."""
        for shard, numbers in (("a", (5, 50000)), ("b", (36, 293))):
            with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
                for number in numbers:
                    image = {"jpg": encode(picture(number)), "cls": 0}
                    tar.write({"__key__": f"val/ILSVRC2012_val_{number:08d}", **image})
        shards = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
        index = index_shards(shards, directory_url=str(tmp_path))
        (tmp_path / "blacklist.txt").write_text("36\n50000\n51\n")
        assert skipped_samples(str(tmp_path / "blacklist.txt"), index).tolist() == [1, 2]

    def test_a_packed_image_is_known_by_its_name(self, tmp_path: Path) -> None:
        names = [f"n01440764/ILSVRC2012_val_{number:08d}.JPEG" for number in (5, 36, 293)]
        images = [RawImage(encode(picture(i)), "jpg", (0,), name) for i, name in enumerate(names)]
        index = write_shards(
            images,
            directory=str(tmp_path / "packed"),
            labels=None,
            prefix="val",
            samples_per_shard=2,
            shard_bytes=None,
        )
        (tmp_path / "blacklist.txt").write_text("36\n293\n")
        assert skipped_samples(str(tmp_path / "blacklist.txt"), index).tolist() == [1, 2]

    def test_a_file_that_names_no_sample_is_an_error(
        self, config: TrainConfig, tmp_path: Path
    ) -> None:
        """A number is no packed key: packing shuffles."""
        (tmp_path / "blacklist.txt").write_text("3\n29\n")
        with pytest.raises(UserError, match="none of its 2 lines names one of the 30 samples"):
            plan_of(with_evaluation(config, skip=str(tmp_path / "blacklist.txt")))

    def test_a_missing_file_is_named(self, config: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="none: the samples to skip cannot be read"):
            plan_of(with_evaluation(config, skip=str(tmp_path / "none")))


class TestLoadModel:
    """The network of a checkpoint, in evaluation mode."""

    def test_with_either_kind_of_weights(self, config: TrainConfig, tmp_path: Path) -> None:
        found = saved(config, tmp_path)
        raw = load_model(config, NUM_LABELS, found, "raw")
        average = load_model(config, NUM_LABELS, found, "average")
        expected = initial_model(replace(config, seed=1), num_classes=NUM_LABELS)
        assert not average.training
        for (name, one), other in zip(
            average.named_parameters(), expected.parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        assert not torch.equal(next(raw.parameters()), next(average.parameters()))
        means = [
            {name: tensor for name, tensor in model.named_buffers() if "running_mean" in name}
            for model in (raw, average)
        ]
        assert all(torch.equal(means[1][name], means[0][name] + 1) for name in means[0])

    def test_before_the_first_update_the_average_is_the_weights(
        self, config: TrainConfig, tmp_path: Path
    ) -> None:
        found = saved(config, tmp_path, with_average=False)
        models = [load_model(config, NUM_LABELS, found, name) for name in ("raw", "average")]
        assert torch.equal(*(next(model.parameters()) for model in models))

    def test_a_run_without_average_says_so(self, config: TrainConfig, tmp_path: Path) -> None:
        found = saved(config, tmp_path, with_average=False)
        plain = replace(config, optimizer=replace(config.optimizer, average_half_life_samples=None))
        with pytest.raises(UserError, match="keeps no average"):
            load_model(plain, NUM_LABELS, found, "average")

    def test_another_network_is_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        found = saved(config, tmp_path)
        wider = replace(config, model=replace(config.model, width=0.125))
        with pytest.raises(UnknownFormat, match="its weights are not those of the network"):
            load_model(wider, NUM_LABELS, found, "raw")


class TestScoringQueue:
    """Which checkpoints are scored."""

    def queue(self, config: TrainConfig, *, every: int) -> ScoringQueue:
        changed = replace(config, checkpoint=CheckpointConfig(evaluate_every=every))
        return ScoringQueue(changed, save_every_samples=14)

    def test_every_nth_checkpoint(self, config: TrainConfig, tmp_path: Path) -> None:
        found = saved(config, tmp_path)  # After 28 samples: the second one.
        for every, is_queued in ((1, True), (2, True), (3, False), (0, False)):
            queue = self.queue(config, every=every)
            queue.add(found, is_last=False)
            assert queue.first == (ScoringRequest(found, "average") if is_queued else None)

    @pytest.mark.parametrize(("every", "is_last"), [(1, False), (0, True)])
    def test_both_kinds_of_weights_are_scored_and_of_the_last_one_always(
        self, config: TrainConfig, tmp_path: Path, every: int, is_last: bool
    ) -> None:
        queue, found = self.queue(config, every=every), saved(config, tmp_path)
        queue.add(found, is_last=is_last)
        assert queue.checkpoint_urls == {found.url}
        for weights in ("average", "raw"):
            assert queue.first is not None
            assert queue.first.weights == weights
            queue.remove_first()
        assert queue.first is None

    def test_while_one_is_scored_only_the_newest_waits(
        self, config: TrainConfig, tmp_path: Path
    ) -> None:
        queue = self.queue(config, every=1)
        first, second, third = (saved(config, tmp_path / name) for name in "abc")
        for found in (first, second, third):
            queue.add(found, is_last=False)
        wanted = []
        while queue.first is not None:
            wanted.append((queue.first.checkpoint.url, queue.first.weights))
            queue.remove_first()
        assert wanted == [
            (found.url, weights) for found in (first, third) for weights in ("average", "raw")
        ]
