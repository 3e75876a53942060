"""The stream: every sample once, resumed to the bit, static shapes, bad data weighed with 0."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datapipe.batch import Batch, normalize
from datapipe.batch_stream import BatchStream
from datapipe.errors import LabelOutOfRange, MissingShard, TooManyBadSamples
from datapipe.index import ShardIndex, ensure_index
from datapipe.lanes import LanePlan
from datapipe.plan import BatchPlan, Segment, lane_batches, leased_batches, sequential_batches
from datapipe.position import Position, Span
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import (
    NUM_CLASSES,
    encode,
    labels_of,
    picture,
    raw_images,
    small_config,
    small_order,
    write_set,
)


def stream_of(
    index: ShardIndex,
    plans: Iterable[BatchPlan],
    *,
    training: bool = True,
    num_classes: int = NUM_CLASSES,
    max_bad_samples: int = 100,
) -> BatchStream:
    return BatchStream.of_plans(
        index,
        small_config(index, max_bad_samples=max_bad_samples),
        plans,
        order=small_order(index, shuffle=training),
        training=training,
        num_classes=num_classes,
    )


def batches_of(
    index: ShardIndex, plans: Iterable[BatchPlan], *, training: bool = True
) -> list[Batch]:
    with stream_of(index, plans, training=training) as stream:
        return list(stream)


def lanes_from(
    position: Position, index: ShardIndex, *, num_lanes: int = 4, samples_per_lane: int = 3
) -> Iterator[BatchPlan]:
    return lane_batches(
        position,
        num_samples=index.num_samples,
        num_lanes=num_lanes,
        samples_per_lane=samples_per_lane,
        lanes=range(num_lanes),
        num_epochs=2,
    )


def real_ids(batches: Iterable[Batch]) -> list[int]:
    return [
        sample_id
        for batch in batches
        for sample_id in batch.sample_ids[batch.sample_weights > 0].tolist()
    ]


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("images", "label_ids", "label_offsets", "sample_weights", "sample_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("spans", "segment_sizes", "num_samples"):
        assert getattr(one, name) == getattr(other, name), name


def set_with_bad_images(directory: Path, bad: set[int], *, num_samples: int = 20) -> ShardIndex:
    """A set in which some images are cut in half, as the index knows: their crc is right."""
    images = [
        RawImage(image.payload[: len(image.payload) // 2], "jpg", image.label_ids)
        if number in bad
        else image
        for number, image in enumerate(raw_images(num_samples))
    ]
    return write_shards(
        images,
        directory=str(directory),
        labels=None,
        prefix="train",
        samples_per_shard=8,
        shard_bytes=None,
    )


def test_every_sample_once_an_epoch_in_batches_of_one_shape(small_index: ShardIndex) -> None:
    batches = batches_of(small_index, lanes_from(Position(), small_index))
    assert sorted(real_ids(batches)) == sorted(2 * list(range(75)))
    assert {tuple(batch.images.shape) for batch in batches} == {(12, 16, 16, 3)}
    assert {batch.segment_sizes for batch in batches} == {(3, 3, 3, 3)}
    assert sum(batch.num_samples for batch in batches) == 150
    for batch in batches:
        assert batch.num_samples == int(batch.sample_weights.sum())
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            first, last = batch.label_offsets[row : row + 2].tolist()
            assert tuple(batch.label_ids[first:last].tolist()) == labels_of(sample_id)


@settings(max_examples=12)
@given(step=st.integers(0, 13))
def test_a_resumed_stream_is_the_same_to_the_bit(small_index: ShardIndex, step: int) -> None:
    whole = batches_of(small_index, lanes_from(Position(), small_index))
    plan = LanePlan(Position(), small_index.num_samples, 4, 3)
    position = plan.position_after(min(step, plan.num_steps))
    resumed = batches_of(small_index, lanes_from(position, small_index))
    assert len(resumed) == len(whole) - min(step, plan.num_steps)
    for one, other in zip(whole[-len(resumed) :], resumed, strict=True):
        assert_same(one, other)


def test_a_sample_looks_the_same_whatever_the_batches(small_index: ShardIndex) -> None:
    def images(batches: list[Batch]) -> dict[int, torch.Tensor]:
        return {
            sample_id: batch.images[row]
            for batch in batches
            for row, sample_id in enumerate(batch.sample_ids.tolist())
            if batch.sample_weights[row] > 0 and batch.spans[0].epoch == 0
        }

    of_lanes = images(batches_of(small_index, lanes_from(Position(), small_index)))
    leases = [Span(0, 0, 40), Span(0, 40, 75)]
    of_leases = images(batches_of(small_index, leased_batches(leases, batch_size=7)))
    assert of_lanes.keys() == of_leases.keys() == set(range(75))
    assert all(torch.equal(of_lanes[key], of_leases[key]) for key in of_lanes)


def test_augmentation_changes_from_epoch_to_epoch(small_index: ShardIndex) -> None:
    spans = [Span(epoch, 0, 75) for epoch in range(2)]
    first, second = batches_of(small_index, leased_batches(spans, batch_size=75))
    assert not torch.equal(first.sample_ids, second.sample_ids)
    rows = first.sample_ids.argsort(), second.sample_ids.argsort()
    changed = (first.images[rows[0]] != second.images[rows[1]]).flatten(1).any(dim=1)
    assert changed.all()


def test_a_batch_over_two_epochs_augments_each_row_for_its_own(small_index: ShardIndex) -> None:
    spans = Span(0, 72, 75), Span(1, 0, 7)
    (both,) = batches_of(small_index, leased_batches(spans, batch_size=10))
    apart = batches_of(
        small_index,
        [plan for span in spans for plan in leased_batches([span], batch_size=span.num_samples)],
    )
    assert torch.equal(both.sample_ids, torch.cat([batch.sample_ids for batch in apart]))
    assert torch.equal(both.images, torch.cat([batch.images for batch in apart]))


def test_evaluation_is_in_order_and_without_augmentation(small_index: ShardIndex) -> None:
    once, again = (
        batches_of(small_index, sequential_batches(75, 20), training=False) for _ in range(2)
    )
    assert real_ids(once) == list(range(75))
    assert once[-1].num_samples == 15
    for one, other in zip(once, again, strict=True):
        assert_same(one, other)


def test_padding_repeats_samples_of_its_segment_with_weight_0(small_index: ShardIndex) -> None:
    plan = BatchPlan((Segment((Span(0, 0, 2),), 5), Segment((), 2), Segment((Span(0, 9, 10),), 2)))
    (batch,) = batches_of(small_index, [plan])
    assert batch.sample_weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 0]
    ids = batch.sample_ids.tolist()
    assert ids[:2] + ids[:2] + ids[:1] == ids[:5]
    assert ids[7] == ids[8]
    assert torch.equal(batch.images[7], batch.images[8])
    assert batch.spans == (Span(0, 0, 2), Span(0, 9, 10))
    assert batch.num_samples == 3


def test_a_batch_without_any_sample_repeats_the_first_of_the_data_set(
    small_index: ShardIndex,
) -> None:
    (batch,) = batches_of(small_index, [BatchPlan((Segment((), 3),))])
    assert batch.num_samples == 0
    assert batch.sample_weights.tolist() == [0, 0, 0]
    first = small_order(small_index).sample_ids(Span(0, 0, 1)).tolist()
    assert batch.sample_ids.tolist() == first * 3
    (of_first,) = batches_of(small_index, [BatchPlan((Segment((Span(0, 0, 1),), 1),))])
    assert all(torch.equal(image, of_first.images[0]) for image in batch.images)


def test_a_truncated_image_is_reported_and_keeps_its_place(tmp_path: Path) -> None:
    index = set_with_bad_images(tmp_path, {3, 11})
    with stream_of(index, sequential_batches(20, 8), training=False) as stream:
        batches = list(stream)
    assert real_ids(batches) == [number for number in range(20) if number not in {3, 11}]
    assert [span for batch in batches for span in batch.spans] == [
        Span(0, 0, 8),
        Span(0, 8, 16),
        Span(0, 16, 20),
    ]
    assert [(bad.shard, bad.key) for bad in stream.corrupt.values()] == [
        ("train-00000.tar", "000003"),
        ("train-00001.tar", "000011"),
    ]
    first = next(iter(stream.corrupt.values()))
    assert "truncated" in first.reason.lower()
    assert batches[0].corrupt == (first,)
    assert batches[0].sample_ids.tolist() == [0, 1, 2, 0, 4, 5, 6, 7]


def test_too_many_bad_samples_end_the_stream_with_their_list(tmp_path: Path) -> None:
    index = set_with_bad_images(tmp_path, {3, 11})
    plans = sequential_batches(20, 8)
    with stream_of(index, plans, training=False, max_bad_samples=1) as stream:
        next(stream)
        with pytest.raises(TooManyBadSamples, match=r"2 corrupt .*000003.*000011"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_a_set_without_any_good_image_ends_the_stream(tmp_path: Path) -> None:
    index = set_with_bad_images(tmp_path, set(range(5)), num_samples=5)
    with (
        stream_of(index, sequential_batches(5, 5), training=False) as stream,
        pytest.raises(TooManyBadSamples, match="all 5 samples of the set are corrupt"),
    ):
        next(stream)


def test_a_truncated_shard_costs_only_its_missing_samples(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=20, samples_per_shard=10)
    shard, table = tmp_path / "train-00000.tar", index.table(0)
    shard.write_bytes(shard.read_bytes()[: table.offsets[6]])
    with stream_of(index, sequential_batches(20, 8), training=False) as stream:
        assert real_ids(stream) == [0, 1, 2, 3, 4, 5, *range(10, 20)]
    assert {bad.reason for bad in stream.corrupt.values()} == {
        "the shard ends before this sample does"
    }


def test_a_missing_shard_is_raised_in_its_place(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=24, samples_per_shard=12)
    (tmp_path / "train-00001.tar").unlink()
    with stream_of(index, sequential_batches(24, 12), training=False) as stream:
        assert next(stream).num_samples == 12
        with pytest.raises(MissingShard, match=r"train-00001\.tar"):
            next(stream)


def test_a_label_without_an_output_is_named(small_index: ShardIndex) -> None:
    plans = sequential_batches(75, 10)
    with (
        stream_of(small_index, plans, training=False, num_classes=9) as stream,
        pytest.raises(LabelOutOfRange, match=r"sample 000002 has label 9, allowed are 0 to 8"),
    ):
        next(stream)


def test_sizes_missing_from_the_index_are_taken_from_the_image(tmp_path: Path) -> None:
    broken_header = b"\xff\xd8\xff\xe0" + bytes(40)
    images = [RawImage(encode(picture(0)), "jpg", (0,)), RawImage(broken_header, "jpg", (0,))]
    index = write_shards(
        images,
        directory=str(tmp_path),
        labels=None,
        prefix="train",
        samples_per_shard=None,
        shard_bytes=None,
    )
    assert index.table(0).widths.tolist() == [24, 0]
    with stream_of(index, sequential_batches(2, 2), training=False) as stream:
        assert next(stream).sample_weights.tolist() == [1, 0]
    assert len(stream.corrupt) == 1


@pytest.mark.parametrize("raised", [ConnectionError, SystemExit])
def test_whatever_ends_the_reading_thread_is_raised_by_next(
    small_index: ShardIndex, raised: type[BaseException]
) -> None:
    def plans() -> Iterator[BatchPlan]:
        yield from sequential_batches(10, 10)
        raise raised("the ledger is gone")

    with stream_of(small_index, plans(), training=False) as stream:
        next(stream)
        with pytest.raises(raised, match="the ledger is gone"):
            next(stream)


class WatchedPlans:
    """Plans of 25 batches; an event each when the fifth and when the sixth is asked for.

    Four batches are made ahead, so a fifth is asked for and a sixth is not, until one is taken.
    """

    def __init__(self) -> None:
        self.fifth, self.sixth = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[BatchPlan]:
        for number, plan in enumerate(sequential_batches(75, 3)):
            if number == 4:
                self.fifth.set()
            if number == 5:
                self.sixth.set()
            yield plan


def test_only_so_many_batches_are_made_ahead(small_index: ShardIndex) -> None:
    plans = WatchedPlans()
    with stream_of(small_index, plans, training=False) as stream:
        assert plans.fifth.wait(timeout=10)
        assert not plans.sixth.wait(timeout=0.2)
        assert next(stream).num_samples == 3
        assert plans.sixth.wait(timeout=10)
        assert len(list(stream)) == 24


def test_closing_ends_the_threads_and_the_iteration(small_index: ShardIndex) -> None:
    before = set(threading.enumerate())
    plans = WatchedPlans()
    stream = stream_of(small_index, plans)
    assert plans.fifth.wait(timeout=10)  # the reading thread has no place for what it reads next
    started = set(threading.enumerate()) - before
    assert started
    stream.close()
    stream.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_wakes_a_consumer_that_waits(small_index: ShardIndex) -> None:
    lease_comes = threading.Event()

    def leases() -> Iterator[Span]:
        lease_comes.wait(timeout=30)
        yield Span(0, 0, 4)

    stream = stream_of(small_index, leased_batches(leases(), batch_size=4))
    received: list[list[Batch]] = []
    consumer = threading.Thread(target=lambda: received.append(list(stream)))
    consumer.start()
    stream.close()
    consumer.join(timeout=10)
    lease_comes.set()
    assert received == [[]]


def test_normalize_scales_to_one_and_is_channels_last() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).repeat(2, 4, 5, 1)
    pixels = normalize(images)
    assert pixels.shape == (2, 3, 4, 5)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    expected = normalize(255 - images)
    again = normalize(255 - images, out=pixels)
    assert again.data_ptr() == pixels.data_ptr()
    assert torch.equal(again, expected)


def test_a_batch_moves_as_a_whole(small_index: ShardIndex) -> None:
    (batch,) = batches_of(small_index, sequential_batches(4, 4), training=False)
    assert_same(batch, batch.to("cpu"))


def test_the_same_stream_from_stock_shards_as_from_ours(
    small_index: ShardIndex, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(len(small_index.shards)):
        url = small_index.shard_url(number)
        os.symlink(url, shards / os.path.basename(url))
    url = ensure_index(str(shards), index_directory=str(tmp_path / "index"))
    ours, stock = (
        batches_of(index, lanes_from(Position(), index))
        for index in (small_index, ShardIndex.open(url))
    )
    for one, other in zip(ours, stock, strict=True):
        assert_same(one, other)
