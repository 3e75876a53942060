"""The plan: every image in one shard, shards of the size that was asked for, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapipe.errors import PackingError
from datapipe.packing import Part
from datapipe.packing_plan import LabelledImage, PackPlan, continued, make_plan
from datapipe.payloads import PayloadOptions
from datapipe.sources import ImageFile

IMAGES = st.lists(
    st.builds(
        lambda size, labels: LabelledImage(
            ImageFile("cat/0.jpg", (), Path("photos"), 0, size), tuple(labels)
        ),
        st.integers(0, 5000),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    min_size=1,
    max_size=40,
)
SHARD_BYTES = st.integers(1, 30_000)


def plan_of(images: list[LabelledImage], shard_bytes: int, *, labels: str = "") -> PackPlan:
    return make_plan(
        images,
        labels=labels,
        prefix="train",
        shard_bytes=shard_bytes,
        payloads=PayloadOptions(),
    )


@given(IMAGES, SHARD_BYTES)
def test_every_image_is_in_one_shard_of_the_size_asked_for(
    images: list[LabelledImage], shard_bytes: int
) -> None:
    plan = plan_of(images, shard_bytes)
    shards = [plan.shard(number) for number in range(plan.num_shards)]
    assert [image for shard in shards for image in shard.images] == images
    assert [shard.first_image for shard in shards] == list(plan.first_images)
    for shard in shards:
        sizes = [image.member_bytes() for image in shard.images]
        assert sum(sizes[:-1]) < shard_bytes
        assert sum(sizes) >= shard_bytes or shard is shards[-1]


@given(st.integers(0, 200), st.integers(1, 30))
def test_every_shard_is_in_one_part(shard: int, count: int) -> None:
    parts = [Part(number, count) for number in range(1, count + 1)]
    assert [part.holds(shard) for part in parts].count(True) == 1


@given(IMAGES, SHARD_BYTES, st.data())
def test_a_plan_that_was_written_is_gone_on_with_whatever_the_sizes_are_now(
    images: list[LabelledImage], shard_bytes: int, data: st.DataObject
) -> None:
    written = plan_of(images, shard_bytes)
    sizes = data.draw(st.lists(st.integers(0, 5000), min_size=len(images), max_size=len(images)))
    repaired = [
        LabelledImage(ImageFile("cat/0.jpg", (), Path("elsewhere"), 0, size), image.label_ids)
        for image, size in zip(images, sizes, strict=True)
    ]
    plan = continued(plan_of(repaired, shard_bytes), written.to_bytes(), where="out")
    assert plan.to_bytes() == written.to_bytes()
    assert plan.fingerprint() == written.fingerprint()


@given(st.binary(max_size=50) | st.sampled_from([b"{}", b'{"format": "datapipe-packing"}', b"[]"]))
def test_a_mark_that_is_no_plan_is_refused(mark: bytes) -> None:
    images = [LabelledImage(ImageFile("cat/0.jpg", (), Path("photos"), 0, 1), ())]
    with pytest.raises(PackingError, match="something else began to write"):
        continued(plan_of(images, 9), mark, where="out")


def test_a_digest_tells_names_sizes_and_labels_apart() -> None:
    def digest(name: str, size: int, labels: tuple[int, ...]) -> str:
        image = LabelledImage(ImageFile(name, (), Path("photos"), 0, size), labels)
        return plan_of([image], 9).shard(0).digest()

    first = digest("cat/0.jpg", 1, (1,))
    others = [("cat/1.jpg", 1, (1,)), ("cat/0.jpg", 2, (1,)), ("cat/0.jpg", 1, (2,))]
    assert len({first, *(digest(*other) for other in others)}) == 4


def test_a_file_that_is_gone_takes_no_bytes(tmp_path: Path) -> None:
    assert ImageFile("0.jpg", (), tmp_path / "0.jpg").num_bytes() == 0
