"""Training on several sets: what is drawn, what labels mean, and what may change on resume."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from datapipe.batch_stream import BatchStream
from datapipe.labels import Label
from datapipe.mixing import TOTAL_SHARE, MixedOrder
from datapipe.plan import leased_batches
from datapipe.position import Span
from datapipe.writer import RawImage, write_shards
from tests.datapipe.small_sets import encode, picture
from tests.small_runs import final, run, small_config
from xdist.config import TrainConfig
from xdist.errors import RunDirectoryError, UserError
from xdist.training_data import Sources

NUM_MORE = 33


def write_more(directory: Path, *, label: int, names: str = "label") -> str:
    """A second set, all of whose images carry one label."""
    images = [RawImage(encode(picture(i)), "jpg", (label,)) for i in range(NUM_MORE)]
    write_shards(
        images,
        directory=str(directory),
        labels=[Label(i, f"{names} {i}", float(i == label)) for i in range(10)],
        prefix="more",
        samples_per_shard=20,
        shard_bytes=None,
    )
    return str(directory)


def mixed_config(directory: Path, *, strategy: str = "push_pull") -> TrainConfig:
    """Three places in four are of the second set, the smaller one."""
    config = small_config(directory, strategy=strategy)
    more = write_more(directory / "more", label=7)
    return replace(config, data=replace(config.data, mix=(more,), mix_weights=(1.0, 3.0)))


def test_samples_come_in_proportion_from_the_right_shards(tmp_path: Path) -> None:
    config = mixed_config(tmp_path)
    found = Sources(config, run_dir=str(tmp_path / "run")).check()
    assert isinstance(found.order, MixedOrder)
    num_samples = found.order.num_samples
    assert num_samples == 90 + NUM_MORE
    leases = leased_batches([Span(0, 0, num_samples)], batch_size=8)
    index = found.open_index()
    drawn: Counter[int] = Counter()
    with BatchStream.of_plans(
        index, config.data, leases, order=found.order, training=True, num_classes=10
    ) as stream:
        for batch in stream:
            for row in range(batch.num_samples):
                sample_id = int(batch.sample_ids[row])
                first, last = batch.label_offsets[row : row + 2].tolist()
                assert sample_id < 90 or batch.label_ids[first:last].tolist() == [7]
                drawn[sample_id] += 1
    of_more = [count for sample_id, count in drawn.items() if sample_id >= 90]
    assert len(of_more) == NUM_MORE
    assert sum(of_more) == pytest.approx(0.75 * num_samples, abs=12)  # A pool of three blocks.
    assert max(of_more) - min(of_more) <= 2


def test_labels_are_weighed_as_they_are_drawn(tmp_path: Path) -> None:
    config = mixed_config(tmp_path)
    frequencies = Sources(config, run_dir=str(tmp_path / "run")).label_frequencies()
    of_first = [0.1 + i / 100 for i in range(10)]  # What labels.json says.
    expected = [value / 4 + 0.75 * (i == 7) for i, value in enumerate(of_first)]
    assert frequencies == pytest.approx(expected, abs=2 / TOTAL_SHARE)


def test_an_id_means_the_same_in_all_sources(tmp_path: Path) -> None:
    config = mixed_config(tmp_path)
    others = write_more(tmp_path / "others", label=3, names="animal")
    data = replace(config.data, mix=(others,))
    sources = Sources(replace(config, data=data), run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"label 0 is 'label 0' in .*train, 'animal 0' in .*others"):
        sources.check()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, 1.0, 1.0)])
def test_each_source_has_a_weight(tmp_path: Path, weights: tuple[float, ...]) -> None:
    data = mixed_config(tmp_path).data
    with pytest.raises(ValueError, match=r"data\.mix_weights is .* for data\.train and each"):
        replace(data, mix_weights=weights)


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("strategy", ["push_pull", "all_reduce"])
def test_a_run_on_a_mixture_goes_on_where_it_was(tmp_path: Path, strategy: str) -> None:
    config = replace(mixed_config(tmp_path, strategy=strategy), num_epochs=1, max_steps=9)
    run(config, tmp_path / "run")
    other = replace(config, data=replace(config.data, mix_weights=(1.0, 1.0)))
    with pytest.raises(RunDirectoryError, match=r"data\.mix_weights"):
        run(other, tmp_path / "run")
    summary = run(replace(config, max_steps=None, num_workers=1), tmp_path / "run")
    assert summary.num_samples == 90 + NUM_MORE
    assert final(tmp_path / "run").manifest.cut.position.epoch == 1
