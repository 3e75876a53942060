"""Streams of workers that come, go, and stop in the middle of an epoch: every sample once."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datapipe.batch import Batch
from datapipe.counters import ReadCounters
from datapipe.index import ShardIndex
from datapipe.mixing import MixedOrder, joined_index, shares_of
from datapipe.order import Order, SampleOrder
from datapipe.position import Position
from datapipe.stream import SampleStream
from tests.datapipe.small_sets import NUM_CLASSES, small_config, small_order, write_set

NUM_EPOCHS = 2


@dataclass(frozen=True)
class Group:
    """Some workers, and the steps that they make before they are replaced by others."""

    world_size: int
    num_lanes: int
    samples_per_lane: int
    num_steps: int


GROUPS = st.builds(
    Group,
    world_size=st.integers(1, 3),
    num_lanes=st.integers(3, 6),
    samples_per_lane=st.integers(1, 5),
    num_steps=st.integers(0, 6),
)


def stream_of(
    index: ShardIndex, group: Group, position: Position, rank: int, *, order: Order | None = None
) -> SampleStream:
    return SampleStream(
        index,
        small_config(index),
        order=order or small_order(index),
        position=position,
        batch_size=group.num_lanes * group.samples_per_lane,
        num_lanes=group.num_lanes,
        rank=rank,
        world_size=group.world_size,
        num_epochs=NUM_EPOCHS,
        training=True,
        num_classes=NUM_CLASSES,
    )


Seen = dict[tuple[int, int], list[Tensor]]
"""(sample, its number among the epochs) -> the images it was seen as."""


def images_of(batches: list[Batch], seen: Seen, order: Order) -> None:
    for batch in batches:
        rows = torch.flatten(torch.nonzero(batch.sample_weights)).tolist()
        epochs = [epoch for span in batch.spans for epoch in order.draw(span).epochs.tolist()]
        for row, epoch in zip(rows, epochs, strict=True):
            seen.setdefault((int(batch.sample_ids[row]), epoch), []).append(batch.images[row])


def train(index: ShardIndex, groups: list[Group], order: Order) -> Seen:
    """All that is seen by these groups, one after the other, the last of them up to the end."""
    seen: Seen = {}
    position = Position()
    for number, group in enumerate(groups):
        is_last = number == len(groups) - 1
        with ExitStack() as stack:
            streams = [
                stack.enter_context(stream_of(index, group, position, rank, order=order))
                for rank in range(group.world_size)
            ]
            num_steps = 0
            while is_last or num_steps < group.num_steps:
                step = [batch for stream in streams if (batch := next(stream, None)) is not None]
                if not step:
                    break
                assert len(step) == group.world_size
                images_of(step, seen, order)
                num_steps += 1
            positions = {stream.position() for stream in streams}
            assert len(positions) == 1
            position = positions.pop()
    return seen


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardIndex]:
    """Sets of 1 to 60 samples in shards of any size."""
    generator = random.Random(5)
    indexes = []
    for number in range(6):
        sizes = [generator.choice([1, 2, 5, 13, 30]) for _ in range(1 + number % 4)]
        parts = [
            write_set(tmp_path_factory.mktemp("shard"), num_samples=size, samples_per_shard=None)
            for size in sizes
        ]
        indexes.append(joined_index(parts))
    return indexes


@settings(max_examples=15)
@given(number=st.integers(0, 5), groups=st.lists(GROUPS, min_size=2, max_size=4))
def test_every_sample_once_an_epoch_and_alike_whoever_reads_it(
    sets: list[ShardIndex], number: int, groups: list[Group]
) -> None:
    index = sets[number]
    order = small_order(index)
    seen = train(index, groups, order)
    expected = train(index, [Group(1, 1, 25, 0)], order)
    samples = range(index.num_samples)
    keys = {(sample, epoch) for sample in samples for epoch in range(NUM_EPOCHS)}
    assert seen.keys() == expected.keys() == keys
    for key, images in seen.items():
        assert len(images) == 1
        assert torch.equal(images[0], expected[key][0])


def test_a_mixture_goes_on_where_another_group_left_it(small_index: ShardIndex) -> None:
    sizes = (50, 25)
    order = MixedOrder(sizes, shares_of(sizes, [1, 2]), 4, 3, seed=5)
    seen = train(small_index, [Group(2, 4, 3, 3), Group(3, 6, 2, 4), Group(1, 3, 5, 0)], order)
    expected = train(small_index, [Group(1, 1, 25, 0)], order)
    assert seen.keys() == expected.keys()
    for key, images in seen.items():
        assert len(images) == 1
        assert torch.equal(images[0], expected[key][0])


def test_counters_are_the_sums_of_what_the_batches_say(tmp_path: Path) -> None:
    index = write_set(tmp_path, num_samples=75, samples_per_shard=20)
    shard = tmp_path / "train-00000.tar"
    content = bytearray(shard.read_bytes())
    content[int(index.table(0).offsets[4]) + 100] ^= 1
    shard.write_bytes(content)
    group = Group(world_size=1, num_lanes=3, samples_per_lane=4, num_steps=0)
    with stream_of(index, group, Position(), 0) as stream:
        batches = list(stream)
        counters = stream.counters()
    assert counters.num_batches == len(batches) == 14
    assert counters.num_samples == sum(batch.num_samples for batch in batches) == 148
    assert counters.num_corrupt == 2  # The same one in both epochs.
    assert counters.data_wait_s > 0
    read = sum((batch.read for batch in batches), ReadCounters())
    assert counters.read == read
    assert read.num_reads == 2 * 19  # Blocks of four, none of which straddles two shards.
    assert read.bytes_read > 2 * int(sum(index.table(0).sizes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10}, "batch_size is 10; allowed: multiples of 4 lanes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"world_size": 5}, "world_size is 5; allowed: 1 to num_lanes"),
        ({"num_lanes": 0}, "world_size is 2; allowed: 1 to num_lanes"),
        ({"rank": 2}, "rank is 2; allowed: 0 to 1"),
        ({"rank": -1}, "rank is -1; allowed: 0 to 1"),
        ({"position": Position(0, ((0, 75),))}, "leaves nothing of an epoch of 75 samples"),
        ({"order": SampleOrder(76, 4, 3, seed=0)}, "order has 76 samples, index 75"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    small_index: ShardIndex, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "order": small_order(small_index),
        "position": Position(),
        "batch_size": 8,
        "num_lanes": 4,
        "rank": 0,
        "world_size": 2,
        "num_epochs": 1,
        "training": True,
        "num_classes": NUM_CLASSES,
    }
    with pytest.raises(ValueError, match=message):
        SampleStream(small_index, small_config(small_index), **(arguments | changes))
